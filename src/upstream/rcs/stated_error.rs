//! The error that an answer states: whether there is one, and its code, wherever writers and gateways put it.

use std::collections::BTreeSet;

use serde_json::value::RawValue;
use zeroize::Zeroizing;

use super::{body::is_padding, json::Json, number::whole_number};

/// The longest error code that is kept, in characters. The upstream's codes have five.
const LONGEST_CODE: usize = 16;
/// The most levels of an error that are searched for its code.
const MOST_LEVELS: usize = 4;
/// The most levels of a whole answer that are searched for a code.
const MOST_LEVELS_OF_ALL: usize = 8;
/// What some APIs write into `error` or its `code` after a success, in lower case and without the signs between words.
const NO_ERROR: [&str; 17] = [
    "none",
    "null",
    "nil",
    "undefined",
    "false",
    "no",
    "n",
    "na",
    "noerror",
    "noerrors",
    "ok",
    "okay",
    "success",
    "succeeded",
    "successful",
    "정상",
    "성공",
];

/// The error that an answer states.
#[derive(Debug, Default, PartialEq)]
pub(super) struct StatedError {
    /// The error's code, reduced to at most 16 ASCII letters and digits so that it can be shown anywhere.
    pub(super) code: Option<String>,
    /// The `status` beside the error, if it is one of an error.
    pub(super) status: Option<u16>,
}

/// The fields of an answer that may state an error: all of each name, since an empty one must not hide one that says
/// something.
#[derive(Default)]
pub(super) struct ErrorFields<'a> {
    /// Each `error` and `errors`.
    pub(super) errors: Vec<&'a RawValue>,
    pub(super) codes: Vec<&'a RawValue>,
    pub(super) statuses: Vec<&'a RawValue>,
}

impl StatedError {
    /// Returns the error that the fields state. A `code` beside the other fields is one only if it is the upstream's own,
    /// since many APIs have such a field in every answer.
    pub(super) fn of(fields: &ErrorFields<'_>) -> Option<Self> {
        let read = |json: &&RawValue| Json::read(json.get(), MOST_LEVELS);
        let errors: Vec<_> = fields.errors.iter().map(read).collect();
        let last = |fields: &[&RawValue]| fields.iter().map(read).rfind(Json::is_set);
        let status = last(&fields.statuses)
            .and_then(|status| whole_number(&status.as_text()?))
            .and_then(|number| u16::try_from(number).ok())
            .filter(|status| (400..600).contains(status));
        let beside = last(&fields.codes).and_then(|code| code.code_text());
        let beside = beside.filter(|code| is_upstream_code(code));
        if !errors.iter().any(Json::is_set) && status.is_none() && beside.is_none() {
            return None;
        }
        let code = errors.iter().find_map(|error| error.code(MOST_LEVELS)).or(beside);
        Some(Self { code, status })
    }
}

/// Returns the upstream's code in a whole answer that is not a token, whatever a gateway wrapped around it: the only one
/// in the members whose name ends in `code`.
pub(super) fn code_anywhere(answer: &str) -> Option<String> {
    let mut codes = BTreeSet::new();
    Json::read(answer, MOST_LEVELS_OF_ALL).collect_codes(MOST_LEVELS_OF_ALL, &mut codes);
    let code = codes.pop_first();
    code.filter(|_| codes.is_empty())
}

impl Json {
    /// Returns the last member with this name that says something.
    fn member(&self, name: &str) -> Option<&Self> {
        let Self::Object(members) = self else { return None };
        let named = || members.iter().filter(|(member, _)| member == name).map(|(_, value)| value);
        named().rfind(|value| value.is_set()).or_else(|| named().next_back())
    }

    /// Returns whether the value of `error` or `error.code` states an error. Some APIs have these fields in every
    /// answer, with `null`, a zero, a status of success or nothing in them after a success.
    fn is_set(&self) -> bool {
        match self {
            Self::Null => false,
            Self::Bool(set) => *set,
            Self::Number(text) => !is_success(text),
            Self::Text(text) => {
                let is_sign = |c: char| is_padding(c) || matches!(c, '-' | '_' | '.' | '/');
                let word: String = text.chars().filter(|c| !is_sign(*c)).collect();
                let word = word.to_lowercase();
                !word.is_empty()
                    && !is_success(text.trim_matches(is_padding))
                    && !NO_ERROR.contains(&word.as_str())
            }
            Self::List(values) => values.iter().any(Self::is_set),
            Self::Object(members) => self
                .member("code")
                .map_or_else(|| members.iter().any(|(_, value)| value.is_set()), Self::is_set),
        }
    }

    /// Returns the code that this value of `error` states: that of its `code` or `error`, of the only element of a
    /// list, or of the JSON text in a string. A value alone is one if it begins with a code of the upstream.
    fn code(&self, levels: usize) -> Option<String> {
        let levels = levels.checked_sub(1)?;
        match self {
            Self::Object(_) => self
                .member("code")
                .and_then(Self::code_text)
                .or_else(|| self.member("error").or_else(|| self.member("errors"))?.code(levels)),
            Self::List(values) => match &values[..] {
                [value] => value.code(levels),
                _ => None,
            },
            Self::Text(text) => match json_in(text) {
                Some(json) => Self::read(json, levels).code(levels),
                // The rest may be a message, which may quote the request.
                None => Self::Text(Zeroizing::new(
                    text.split(is_padding).find(|word| !word.is_empty())?.to_owned(),
                ))
                .upstream_code(),
            },
            _ => self.upstream_code(),
        }
    }

    /// Returns the code in the value of `code`, reduced to at most 16 ASCII letters and digits.
    fn code_text(&self) -> Option<String> {
        if let Self::List(values) = self {
            let [value] = &values[..] else { return None };
            return value.code_text();
        }
        let text = self.as_text().filter(|_| self.is_set())?;
        let text = text.trim_matches(is_padding);
        // Some writers take it for a number with a point, prefix it, or write the message behind it.
        let number = whole_number(text).map(|number| number.to_string());
        let digits = text.split(|c: char| !c.is_ascii_digit()).map(str::to_owned);
        let own = number.into_iter().chain(digits).find(|code| is_upstream_code(code));
        let code = own.unwrap_or_else(|| {
            text.chars().filter(char::is_ascii_alphanumeric).take(LONGEST_CODE).collect()
        });
        Some(code).filter(|code| !code.is_empty())
    }

    /// Returns the code in the value of `code` if it is one of the upstream.
    fn upstream_code(&self) -> Option<String> {
        self.code_text().filter(|code| is_upstream_code(code))
    }

    /// Adds the upstream's codes in all members whose name ends in `code` to `codes`.
    fn collect_codes(&self, levels: usize, codes: &mut BTreeSet<String>) {
        let Some(levels) = levels.checked_sub(1) else { return };
        match self {
            Self::Object(members) => {
                for (name, value) in members {
                    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
                    if name.to_ascii_lowercase().ends_with("code") {
                        codes.extend(value.upstream_code());
                    }
                    value.collect_codes(levels, codes);
                }
            }
            Self::List(values) => {
                for value in values {
                    value.collect_codes(levels, codes);
                }
            }
            Self::Text(text) => {
                if let Some(json) = json_in(text) {
                    Self::read(json, levels).collect_codes(levels, codes);
                }
            }
            Self::Null | Self::Bool(_) | Self::Number(_) => {}
        }
    }
}

/// Returns the JSON text of an object or a list in a string.
fn json_in(text: &str) -> Option<&str> {
    Some(text.trim_matches(is_padding)).filter(|text| text.starts_with(['{', '[']))
}

/// Returns whether a code is a zero in any notation, or the status of a success.
fn is_success(code: &str) -> bool {
    code.trim_matches('0').is_empty()
        || whole_number(code).is_some_and(|code| code == 0 || (200..300).contains(&code))
}

/// Returns whether a code has the form of the upstream's own: five digits, the first of which is a six.
fn is_upstream_code(code: &str) -> bool {
    code.len() == 5 && code.starts_with('6') && code.bytes().all(|b| b.is_ascii_digit())
}
