//! Characters in settings that people do not see or take for others, such as those that come with pasted text.

use crate::domain::odd_character::OddCharacter;

/// Refuses characters in `text` that people do not see, and blanks other than the ordinary one, which no setting needs.
pub(super) fn check_characters(text: &str) -> Result<(), String> {
    let is_unusual = |c: char| {
        (c.is_whitespace() && !c.is_ascii())
            || matches!(c, '\u{200c}' | '\u{200d}' | '\u{fe00}'..='\u{fe0f}')
    };
    if OddCharacter::in_text(text).is_some() || text.contains(is_unusual) {
        return Err("has an invisible character".into());
    }
    Ok(())
}

/// Returns `: character 5 is a …` for the end of a fault of `text`, if it has a character that people do not see or take
/// for another one, and nothing otherwise.
pub(super) fn odd_character(text: &str) -> String {
    // The faults say where white space is not allowed.
    let text = text.replace(|c: char| c.is_ascii_whitespace(), "_");
    OddCharacter::in_word(&text).map(|odd| format!(": {odd}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_odd_character_is_named_by_its_position_and_kind() {
        assert_eq!(check_characters("/var/lib/토큰 dir"), Ok(()));
        for text in [
            "a\u{200b}",
            "\u{feff}a",
            "a\u{a0}",
            "a\u{3000}b",
            "\u{2009}a",
            "30\u{202f}s",
            "a\u{200d}",
        ] {
            assert!(check_characters(text).is_err(), "{text:?}");
        }
        assert_eq!(odd_character("127.0.0.1 :1"), "");
        assert_eq!(odd_character("a b\u{a0}"), ": character 4 is a no-break space (U+00A0)");
        assert_eq!(odd_character("１２７"), ": character 1 is a full-width or half-width form");
    }
}
