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
