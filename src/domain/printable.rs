//! Texts from elsewhere, such as the database, files, the upstream and callers, in a form that is safe to print.
//!
//! A terminal acts on control characters: they move its cursor, and so can overwrite what was printed before. A line
//! break begins a line that looks like one of ours. Characters that are invisible or change the direction of writing
//! make one text look like another.

use std::{borrow::Cow, fmt::Write};

/// Invisible characters besides those that [`char::is_control`] knows: line and paragraph separators, and all format
/// characters (category Cf of Unicode), which change the direction of writing, or have no width.
const INVISIBLE: [(char, char); 21] = [
    ('\u{ad}', '\u{ad}'),
    ('\u{600}', '\u{605}'),
    ('\u{61c}', '\u{61c}'),
    ('\u{6dd}', '\u{6dd}'),
    ('\u{70f}', '\u{70f}'),
    ('\u{890}', '\u{891}'),
    ('\u{8e2}', '\u{8e2}'),
    ('\u{180e}', '\u{180e}'),
    ('\u{200b}', '\u{200f}'),
    ('\u{2028}', '\u{202e}'),
    ('\u{2060}', '\u{206f}'),
    ('\u{feff}', '\u{feff}'),
    ('\u{fff9}', '\u{fffb}'),
    ('\u{110bd}', '\u{110bd}'),
    ('\u{110cd}', '\u{110cd}'),
    ('\u{13430}', '\u{1343f}'),
    ('\u{1bca0}', '\u{1bca3}'),
    ('\u{1d173}', '\u{1d17a}'),
    ('\u{e0000}', '\u{e007f}'),
    ('\u{3164}', '\u{3164}'),
    ('\u{ffa0}', '\u{ffa0}'),
];

/// Returns whether a terminal shows `c` as a character of the line, in the place where it is.
#[must_use]
pub fn is_printable(c: char) -> bool {
    let is_invisible = || INVISIBLE.iter().any(|(first, last)| (*first..=*last).contains(&c));
    !c.is_control() && (c.is_ascii() || !is_invisible())
}

/// Returns `text` with all other characters than printable ones escaped, such as `\u{1b}`. It is one line.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |c, to| write!(to, "{}", c.escape_unicode()))
}

/// Returns JSON, which may have several lines, with all characters that are not printable escaped. It has the same
/// value.
#[must_use]
pub fn printable_json(json: &str) -> Cow<'_, str> {
    escaped(json, |c, to| match c {
        // Between values. Within strings, JSON escapes it.
        '\n' => to.write_char(c),
        _ => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(to, "\\u{unit:04x}")),
    })
}

fn escaped(text: &str, escape: impl Fn(char, &mut String) -> std::fmt::Result) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_printable(c) {
            escaped.push(c);
        } else {
            // Writing to a string does not fail.
            let _ = escape(c, &mut escaped);
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[test]
    fn what_is_not_shown_where_it_stands_is_escaped() {
        for (text, shown) in [
            ("acme", "acme"),
            ("서울 \"é\" \\", "서울 \"é\" \\"),
            ("61006\u{1b}[2J\u{1b}[H", r"61006\u{1b}[2J\u{1b}[H"),
            ("a\nok  all of it holds", r"a\u{a}ok  all of it holds"),
            ("a\rb\tc\u{8}\u{7f}", r"a\u{d}b\u{9}c\u{8}\u{7f}"),
            ("\u{9b}2J\u{85}", r"\u{9b}2J\u{85}"),
            ("\u{202e}emca\u{202c} \u{2066}\u{2069}", r"\u{202e}emca\u{202c} \u{2066}\u{2069}"),
            ("ac\u{200b}me\u{feff}\u{ad}", r"ac\u{200b}me\u{feff}\u{ad}"),
            ("a\u{2028}b\u{2029}c", r"a\u{2028}b\u{2029}c"),
            ("\u{e0041}", r"\u{e0041}"),
        ] {
            assert_eq!(printable(text), shown);
            assert_eq!(printable(&printable(text)), shown, "once is enough");
        }
    }

    proptest! {
        #[test]
        fn a_printable_text_moves_no_cursor(text in any::<String>()) {
            prop_assert!(printable(&text).chars().all(is_printable));
        }

        #[test]
        fn printable_json_has_the_same_value(text in any::<String>()) {
            let value = Value::from(text + "\u{202e}\u{9b}\u{7f}\u{e0041}\n");
            let json = serde_json::to_string_pretty(&[&value]).unwrap();
            let shown = printable_json(&json);
            prop_assert!(shown.lines().all(|line| line.chars().all(is_printable)));
            let read: Vec<Value> = serde_json::from_str(&shown).unwrap();
            prop_assert_eq!(read, [value]);
        }
    }
}
