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

/// What the last two characters of each plane of Unicode and a few others are.
const NOT_A_CHARACTER: &str = "a character that does not exist";
/// What the letters are of which some systems, such as macOS, compose Hangul.
const HANGUL_PART: &str = "a part of a Hangul syllable: compose it (Unicode's form NFC)";
/// What each other character is that no word has.
const OTHER: &str = "neither ASCII nor a Hangul syllable";

/// The characters that are named for people, in ascending order: the first and the last of a range, whether they are
/// odd in text for people too, and what they are. `token_broker_odd_character` in
/// `migrations/repeatable/1_common.sql` has the same table.
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
    ('\u{1100}', '\u{115e}', false, HANGUL_PART),
    ('\u{115f}', '\u{1160}', true, "an invisible character"),
    ('\u{1161}', '\u{11ff}', false, HANGUL_PART),
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
    ('\u{d7b0}', '\u{d7fb}', false, HANGUL_PART),
    ('\u{e000}', '\u{f8ff}', false, "a character for private use"),
    ('\u{fb00}', '\u{fb06}', false, "a ligature"),
    ('\u{fdd0}', '\u{fdef}', true, NOT_A_CHARACTER),
    ('\u{fe00}', '\u{fe0f}', false, "a variation selector"),
    ('\u{fe20}', '\u{fe2f}', false, "a combining mark"),
    ('\u{fe50}', '\u{fe6f}', false, "typographic punctuation"),
    ('\u{feff}', '\u{feff}', true, "a byte order mark (U+FEFF)"),
    ('\u{ff00}', '\u{ff9f}', false, "a full-width or half-width form"),
    ('\u{ffa0}', '\u{ffa0}', true, "an invisible character"),
    ('\u{ffa1}', '\u{ffef}', false, "a full-width or half-width form"),
    ('\u{fff0}', '\u{fffb}', true, "an invisible character"),
    ('\u{fffc}', '\u{fffd}', true, "a replacement for a character that was lost"),
    ('\u{110bd}', '\u{110bd}', false, "an invisible character"),
    ('\u{110cd}', '\u{110cd}', false, "an invisible character"),
    ('\u{13430}', '\u{1345f}', false, "an invisible character"),
    ('\u{16fe4}', '\u{16fe4}', true, "an invisible character"),
    ('\u{1bca0}', '\u{1bca3}', true, "an invisible character"),
    ('\u{1d159}', '\u{1d159}', true, "an invisible character"),
    ('\u{1d173}', '\u{1d17a}', true, "an invisible character"),
    ('\u{1d400}', '\u{1d7ff}', false, "a mathematical letter"),
    ('\u{e0000}', '\u{e0fff}', true, "an invisible character"),
    ('\u{f0000}', '\u{10ffff}', false, "a character for private use"),
];

impl OddCharacter {
    /// Finds the first character of a word, such as an API KEY, that is neither visible ASCII nor a Hangul syllable.
    ///
    /// The upstream shows API KEYs and client ids in ASCII. Its document does not say that they are, and its console is
    /// Korean, so Hangul is accepted. Nothing else is: Unicode has too many characters that people do not see, or take
    /// for others, to list them.
    #[must_use]
    pub fn in_word(word: &str) -> Option<Self> {
        Self::find(word, |c| match c {
            '!'..='~' | '\u{ac00}'..='\u{d7a3}' => None,
            c => Some(named(c).map_or(OTHER, |(_, kind)| kind)),
        })
    }

    /// Finds the first odd character of a text for people, or of a setting. White space and what emoji consist of
    /// are not odd there.
    #[must_use]
    pub fn in_text(text: &str) -> Option<Self> {
        Self::find(text, |c| named(c).filter(|(in_text, _)| *in_text).map(|(_, kind)| kind))
    }

    fn find(value: &str, kind_of: impl Fn(char) -> Option<&'static str>) -> Option<Self> {
        let mut characters = value.chars().zip(1..);
        characters.find_map(|(c, position)| Some(Self { position, kind: kind_of(c)? }))
    }
}

/// Returns whether a character that has a name is odd in text for people too, and what it is.
fn named(c: char) -> Option<(bool, &'static str)> {
    if u32::from(c) & 0xfffe == 0xfffe {
        return Some((true, NOT_A_CHARACTER));
    }
    let (.., in_text, kind) = ODD.iter().find(|(first, last, ..)| (*first..=*last).contains(&c))?;
    Some((*in_text, kind))
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
            ("SK.К", "character 4 is neither ASCII nor a Hangul syllable"),
            (
                "\u{1112}\u{1161}",
                "character 1 is a part of a Hangul syllable: compose it (Unicode's form NFC)",
            ),
            ("a\u{1ffff}", "character 2 is a character that does not exist"),
        ] {
            assert_eq!(OddCharacter::in_word(value).unwrap().to_string(), says, "{value:?}");
        }
        for word in ["SK.atIs4g04r6PJepf", "가나다힣", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", ""]
        {
            assert_eq!(OddCharacter::in_word(word), None, "{word}");
        }
    }

    #[test]
    fn what_people_take_for_other_characters_or_do_not_see_is_odd_in_words() {
        for (kind, characters) in [
            (
                "look-alikes",
                "КΚ\u{131}\u{17f}\u{37e}\u{2215}\u{2236}\u{2160}\u{2460}\u{2b0}\u{1d2c}\u{2bc}\u{a789}\u{384}\u{589}\u{703}\u{a4d0}\u{13aa}\u{1f130}\u{1d2c}ßŀ\u{1c6}",
            ),
            (
                "not in normal form C",
                "\u{1112}\u{1161}\u{11ab}\u{d7b0}\u{3099}\u{212a}\u{212b}\u{2126}\u{f900}\u{2f00}",
            ),
            ("combining marks", "\u{300}\u{483}\u{5b0}\u{64b}\u{902}\u{e31}\u{20dd}"),
            ("invisible", "\u{1d159}\u{16fe4}\u{180e}\u{3164}\u{2800}\u{e0100}\u{e0061}\u{fff9}"),
            ("without a character", "\u{378}\u{1ffff}\u{5fffe}\u{fdd0}\u{e000}\u{10fffd}\u{d7a4}"),
            ("others", "é·²º→│🔒あ漢ㄱ"),
        ] {
            for c in characters.chars() {
                let odd = OddCharacter::in_word(&format!("S{c}")).map(|odd| odd.position);
                assert_eq!(odd, Some(2), "{kind}: {c:?}");
            }
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
            "a\u{2fffe}",
            "a\u{1d159}",
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
        fn words_have_visible_ascii_and_hangul_only(c in any::<char>()) {
            let may_be = c.is_ascii_graphic() || ('가'..='힣').contains(&c);
            prop_assert_eq!(OddCharacter::in_word(&c.to_string()).is_none(), may_be);
        }
    }
}
