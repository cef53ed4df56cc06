//! Characters in settings that people do not see or take for others, such as those that come with pasted text.

use crate::domain::odd_character::OddCharacter;

/// Refuses invisible characters in `text`, which no setting needs.
pub(super) fn check_characters(text: &str) -> Result<(), String> {
    match OddCharacter::in_text(text) {
        Some(_) => Err("has an invisible character".into()),
        None => Ok(()),
    }
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
        assert!(check_characters("a\u{200b}").is_err() && check_characters("\u{feff}a").is_err());
        assert_eq!(odd_character("127.0.0.1 :1"), "");
        assert_eq!(odd_character("a b\u{a0}"), ": character 4 is a no-break space (U+00A0)");
        assert_eq!(odd_character("１２７"), ": character 1 is a full-width or half-width form");
    }
}
