//! Errors of the command line, without what was typed as a value: it may be a secret that was pasted into the wrong
//! place, and the output of a command goes to logs that more people read than the command itself.

use clap::error::{ContextKind, ContextValue, Error};

/// What stands for a value.
const HIDDEN: &str = "…";

/// Returns `error` without the values that it quotes. Names of flags and of commands' arguments stay.
pub(super) fn without_values(mut error: Error) -> Error {
    for kind in [ContextKind::InvalidValue, ContextKind::InvalidSubcommand] {
        if error.get(kind).is_some() {
            error.insert(kind, ContextValue::String(HIDDEN.into()));
        }
    }
    // An argument that no command takes is a flag with a wrong name, or a value.
    let is_value = |value: &ContextValue| match value {
        ContextValue::String(text) => !text.strip_prefix("--").is_some_and(is_flag_name),
        _ => false,
    };
    if error.get(ContextKind::InvalidArg).is_some_and(is_value)
        && error.kind() == clap::error::ErrorKind::UnknownArgument
    {
        error.insert(ContextKind::InvalidArg, ContextValue::String(HIDDEN.into()));
        // The advice repeats the value.
        error.remove(ContextKind::Suggested);
    }
    error
}

/// Whether `text` looks like the name of a flag.
fn is_flag_name(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{super::Cli, *};

    #[test]
    fn no_error_of_the_command_line_quotes_a_value() {
        for arguments in [
            &["account", "rotate", "acme", "SK.canary"][..],
            &["account", "rotate", "acme", "-SK.canary"],
            &["account", "rotate", "acme", "--SK.canary=canary"],
            &["account", "add", "SK.canary", "--client-id", "id"],
            &["account", "add", "acme", "--client-id", "canary canary canary canary"],
            &["account", "add", "acme", "--client-secret", "SK.canary"],
            &["account", "add", "acme", "--client-secret=SK.canary"],
            &["account", "list", "postgresql://u:canary@h/d"],
            &["account", "reissue", "--state", "canary"],
            &["audit", "who", "eyJcanary"],
            &["token", "get", "acme", "tbk_canary"],
            &["token", "get", "acme", "--bearer=tbk_canary"],
            &["token", "get", "tbk_Canary canary"],
            &["caller", "limit", "billing", "canary"],
            &["caller", "bearer", "revoke", "canary"],
            &["caller", "grant", "billing", "acme", "--until", "canary"],
            &["canary"],
            &["account", "canary"],
            &["serve", "--migrate=canary"],
            &["completions", "canary"],
        ] {
            let line = ["token-broker"].iter().chain(arguments);
            let Err(error) = Cli::try_parse_from(line) else { panic!("{arguments:?}") };
            let error = without_values(error);
            let (printed, debug) = (error.render().ansi().to_string(), format!("{error:?}"));
            assert!(!printed.to_lowercase().contains("canary"), "{arguments:?}\n{printed}");
            assert!(!debug.to_lowercase().contains("canary"), "{arguments:?}\n{debug}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn an_error_of_the_command_line_names_the_flag_or_argument_that_is_wrong() {
        for (arguments, says) in [
            (&["account", "lst"][..], "a similar subcommand exists: 'list'"),
            (&["account", "add", "Acme", "--client-id", "id"], "for '<NAME>'"),
            (&["account", "reissue", "--state", "lost"], "for '--state <STATE>'"),
            (&["serve", "--lissten", "x"], "'--lissten'"),
            (&["account", "rotate", "acme", "SK.x"], "unexpected argument"),
        ] {
            let line = ["token-broker"].iter().chain(arguments);
            let Err(error) = Cli::try_parse_from(line) else { panic!("{arguments:?}") };
            let printed = without_values(error).render().to_string();
            assert!(printed.contains(says), "{arguments:?}\n{printed}");
        }
    }
}
