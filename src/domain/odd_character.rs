//! Characters that people do not see, or take for others: what a value gets when it is pasted from a document, a
//! message or a web page.

use std::fmt;

/// A character that a value should not have: where it is, and what it is, without the rest of the value.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OddCharacter {
    /// The position, in characters from 1.
    pub position: usize,
    /// What the character is, such as `a zero width space (U+200B)`.
    pub kind: &'static str,
}

/// The odd characters, in ascending order: the first and the last of a range, whether they are odd in text for
/// people too, and what they are. `token_broker_odd_character` in `migrations/repeatable/1_common.sql` has the same
/// table.
const ODD: &[(char, char, bool, &str)] = &[
    ('\u{0}', '\u{8}', true, "a control character"),
    ('\u{9}', '\u{9}', false, "a tab"),
    ('\u{a}', '\u{a}', false, "a line feed"),
    ('\u{b}', '\u{c}', true, "a control character"),
    ('\u{d}', '\u{d}', false, "a carriage return"),
    ('\u{e}', '\u{1f}', true, "a control character"),
    ('\u{20}', '\u{20}', false, "a space"),
    ('\u{7f}', '\u{9f}', true, "a control character"),
    ('\u{a0}', '\u{a0}', false, "a no-break space (U+00A0)"),
    ('\u{ad}', '\u{ad}', true, "a soft hyphen (U+00AD)"),
    ('\u{300}', '\u{34e}', false, "a combining mark"),
    ('\u{34f}', '\u{34f}', true, "an invisible character"),
    ('\u{350}', '\u{36f}', false, "a combining mark"),
    ('\u{600}', '\u{605}', false, "an invisible character"),
    ('\u{61c}', '\u{61c}', true, "a mark of the writing direction"),
    ('\u{6dd}', '\u{6dd}', false, "an invisible character"),
    ('\u{70f}', '\u{70f}', false, "an invisible character"),
    ('\u{890}', '\u{891}', false, "an invisible character"),
    ('\u{8e2}', '\u{8e2}', false, "an invisible character"),
    ('\u{115f}', '\u{1160}', true, "an invisible character"),
    ('\u{1680}', '\u{1680}', false, "an unusual space"),
    ('\u{17b4}', '\u{17b5}', true, "an invisible character"),
    ('\u{180b}', '\u{180f}', true, "an invisible character"),
    ('\u{1ab0}', '\u{1aff}', false, "a combining mark"),
    ('\u{1dc0}', '\u{1dff}', false, "a combining mark"),
    ('\u{2000}', '\u{200a}', false, "an unusual space"),
    ('\u{200b}', '\u{200b}', true, "a zero width space (U+200B)"),
    ('\u{200c}', '\u{200d}', false, "a zero width joiner or non-joiner"),
    ('\u{200e}', '\u{200f}', true, "a mark of the writing direction"),
    ('\u{2010}', '\u{2027}', false, "typographic punctuation"),
    ('\u{2028}', '\u{2029}', true, "a line or paragraph separator"),
    ('\u{202a}', '\u{202e}', true, "a mark of the writing direction"),
    ('\u{202f}', '\u{202f}', false, "an unusual space"),
    ('\u{2030}', '\u{205e}', false, "typographic punctuation"),
    ('\u{205f}', '\u{205f}', false, "an unusual space"),
    ('\u{2060}', '\u{2065}', true, "an invisible character"),
    ('\u{2066}', '\u{2069}', true, "a mark of the writing direction"),
    ('\u{206a}', '\u{206f}', true, "an invisible character"),
    ('\u{20d0}', '\u{20ff}', false, "a combining mark"),
    ('\u{2100}', '\u{214f}', false, "a letter-like symbol"),
    ('\u{2212}', '\u{2212}', false, "typographic punctuation"),
    ('\u{2800}', '\u{2800}', true, "an invisible character"),
    ('\u{3000}', '\u{3000}', false, "an ideographic space (U+3000)"),
    ('\u{3001}', '\u{303f}', false, "typographic punctuation"),
    ('\u{3164}', '\u{3164}', true, "an invisible character"),
    ('\u{e000}', '\u{f8ff}', false, "a character for private use"),
    ('\u{fb00}', '\u{fb06}', false, "a ligature"),
    ('\u{fdd0}', '\u{fdef}', true, "a character that does not exist"),
    ('\u{fe00}', '\u{fe0f}', false, "a variation selector"),
    ('\u{fe20}', '\u{fe2f}', false, "a combining mark"),
    ('\u{fe50}', '\u{fe6f}', false, "typographic punctuation"),
    ('\u{feff}', '\u{feff}', true, "a byte order mark (U+FEFF)"),
    ('\u{ff00}', '\u{ff9f}', false, "a full-width or half-width form"),
    ('\u{ffa0}', '\u{ffa0}', true, "an invisible character"),
    ('\u{ffa1}', '\u{ffef}', false, "a full-width or half-width form"),
    ('\u{fff0}', '\u{fffb}', true, "an invisible character"),
    ('\u{fffc}', '\u{fffd}', true, "a replacement for a character that was lost"),
    ('\u{fffe}', '\u{ffff}', true, "a character that does not exist"),
    ('\u{110bd}', '\u{110bd}', false, "an invisible character"),
    ('\u{110cd}', '\u{110cd}', false, "an invisible character"),
    ('\u{13430}', '\u{1345f}', false, "an invisible character"),
    ('\u{1bca0}', '\u{1bca3}', true, "an invisible character"),
    ('\u{1d173}', '\u{1d17a}', true, "an invisible character"),
    ('\u{1d400}', '\u{1d7ff}', false, "a mathematical letter"),
    ('\u{e0000}', '\u{e0fff}', true, "an invisible character"),
    ('\u{f0000}', '\u{10ffff}', false, "a character for private use"),
];

impl OddCharacter {
    /// Finds the first odd character of a value that consists of visible characters only, such as an API KEY or a
    /// name.
    #[must_use]
    pub fn in_word(word: &str) -> Option<Self> {
        Self::find(word, true)
    }

    /// Finds the first odd character of a text for people, or of a setting. White space and what emoji consist of
    /// are not odd there.
    #[must_use]
    pub fn in_text(text: &str) -> Option<Self> {
        Self::find(text, false)
    }

    fn find(value: &str, in_words: bool) -> Option<Self> {
        value.chars().enumerate().find_map(|(before, c)| {
            let (.., kind) = ODD.iter().find(|(first, last, in_text, _)| {
                (*first..=*last).contains(&c) && (*in_text || in_words)
            })?;
            Some(Self { position: before + 1, kind })
        })
    }
}

impl fmt::Display for OddCharacter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "character {} is {}", self.position, self.kind)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_position_is_counted_in_characters_and_the_kind_is_named() {
        for (value, says) in [
            ("SK.\u{200b}1", "character 4 is a zero width space (U+200B)"),
            ("\u{feff}SK.1", "character 1 is a byte order mark (U+FEFF)"),
            ("가나\u{a0}", "character 3 is a no-break space (U+00A0)"),
            ("\u{e0041}", "character 1 is an invisible character"),
            ("a\u{202e}", "character 2 is a mark of the writing direction"),
            ("SK.…", "character 4 is typographic punctuation"),
            ("ＳＫ", "character 1 is a full-width or half-width form"),
            ("a b", "character 2 is a space"),
            ("\u{7}", "character 1 is a control character"),
        ] {
            assert_eq!(OddCharacter::in_word(value).unwrap().to_string(), says, "{value:?}");
        }
        for word in ["SK.atIs4g04r6PJepf", "가나다", "é", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", ""]
        {
            assert_eq!(OddCharacter::in_word(word), None, "{word}");
        }
    }

    #[test]
    fn text_for_people_may_have_white_space_and_emoji() {
        for text in [
            "한국어 설명, 두 줄\n둘째\t칸\r\n",
            "👨\u{200d}👩\u{200d}👧 ❤\u{fe0f}",
            "a\u{a0}b — “c”…",
            "１００％",
        ] {
            assert_eq!(OddCharacter::in_text(text), None, "{text}");
        }
        for text in [
            "a\u{0}",
            "a\u{85}",
            "a\u{200b}",
            "a\u{feff}",
            "a\u{2066}",
            "a\u{2028}",
            "a\u{ad}",
            "a\u{fffd}",
        ] {
            assert_eq!(OddCharacter::in_text(text).map(|odd| odd.position), Some(2), "{text:?}");
        }
    }

    #[test]
    fn the_table_is_in_ascending_order() {
        assert!(ODD.iter().all(|(first, last, ..)| first <= last));
        assert!(ODD.windows(2).all(|pair| pair[0].1 < pair[1].0));
    }

    proptest! {
        #[test]
        fn white_space_and_control_characters_are_odd_in_words(c in any::<char>()) {
            if c.is_whitespace() || c.is_control() {
                prop_assert!(OddCharacter::in_word(&c.to_string()).is_some());
            }
        }
    }
}
