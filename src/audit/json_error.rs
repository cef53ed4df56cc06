//! Descriptions of JSON errors that never quote the input.

use serde_json::error::Category;

/// Beginnings of the messages that contain only constant text and names of fields.
const SAFE_MESSAGES: [&str; 3] = ["a time is not in whole", "missing field", "duplicate field"];

/// Describes `error` and its column in the line.
///
/// Messages of `serde_json` can quote values, and a file that was named by mistake may hold a secret. So
/// only messages that cannot contain input are passed on.
pub(super) fn describe(error: &serde_json::Error) -> String {
    let message = error.to_string();
    if SAFE_MESSAGES.iter().any(|safe| message.starts_with(safe)) {
        return message;
    }
    let what = match error.classify() {
        Category::Io => "it cannot be read",
        Category::Syntax => "it is not valid JSON",
        Category::Data => "a value has the wrong type or form",
        Category::Eof => "it ends within a JSON value",
    };
    format!("{what}, at column {}", error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_is_not_quoted() {
        for (line, expected) in [
            (r#"{"chain":7}"#, "a value has the wrong type or form, at column 10"),
            (r#""canary-73""#, "a value has the wrong type or form, at column 11"),
            ("canary-73", "it is not valid JSON, at column 1"),
            (r#"{"chain""#, "it ends within a JSON value, at column 8"),
        ] {
            let error = serde_json::from_str::<crate::audit::chain::ChainLink>(line).unwrap_err();
            assert_eq!(describe(&error), expected, "{line}");
        }
    }
}
