//! Input from the user: API KEYs and confirmations.

use std::{
    io::{self, IsTerminal, Write},
    mem,
    os::fd::AsFd,
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail};
use zeroize::Zeroizing;

use crate::{
    domain::secret::ClientSecret,
    files::{
        bounded::{self, Limits},
        given_path::shown,
        text,
    },
};

/// The limits of what is read. No API KEY is that long; the program that writes it may ask somebody for a password.
const SECRET: Limits = Limits { bytes: 4096, wait: Duration::from_mins(1) };

/// Reads an API KEY from `file` if it is given, and otherwise from standard input. If that is a terminal,
/// prints a prompt that names `owner`, and turns off the echo. Blocks until the API KEY has been read.
pub(super) fn client_secret(file: Option<&Path>, owner: &str) -> anyhow::Result<ClientSecret> {
    let text = match file {
        Some(path) => bounded::open(path)
            .and_then(|file| read(&file, SECRET))
            .with_context(|| format!("cannot read {}", shown(path)))?,
        None if io::stdin().is_terminal() => {
            Zeroizing::new(rpassword::prompt_password(format!("API KEY of {owner}: "))?)
        }
        None => read(&io::stdin(), SECRET).context("cannot read the secret from standard input")?,
    };
    Ok(ClientSecret::new(&text)?)
}

/// Reads a text to its end.
pub(super) fn read(from: &impl AsFd, limits: Limits) -> io::Result<Zeroizing<String>> {
    Ok(text::decode(mem::take(&mut *bounded::read_from(from, limits)?))?)
}

/// Asks the user to confirm the removal of `what` by typing its name, unless `yes` is set.
///
/// # Errors
/// When the user types another name, or standard input is not a terminal.
pub(super) fn confirm_removal(what: &str, name: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        bail!("removing {what} {name} cannot be undone: say --yes");
    }
    write!(io::stderr().lock(), "This cannot be undone. Type the name of the {what} to remove: ")?;
    let mut typed = String::new();
    io::stdin().read_line(&mut typed)?;
    if typed.trim() != name {
        bail!("nothing was removed");
    }
    Ok(())
}
