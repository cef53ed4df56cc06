//! Where a deployment's tables are, as the settings say.

use std::fmt;

use sqlx::postgres::PgConnectOptions;

/// Host, port and database, without the user, and the schemas if others than `public` are set. A Unix socket counts as
/// a host by its directory. Nothing of it comes from the database.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Location {
    database: String,
    /// The value of `search_path`, without white space; `None` if that is `public` or is not set.
    schemas: Option<String>,
}

impl Location {
    pub(super) fn of(options: &PgConnectOptions) -> Self {
        let socket = options.get_socket().map(|path| path.display().to_string());
        let host = socket.unwrap_or_else(|| options.get_host().to_owned());
        let database = options.get_database().unwrap_or_else(|| options.get_username());
        // As in a URL, brackets tell the colons of an IPv6 address from the one before the port.
        let is_ipv6 = host.contains(':') && !host.starts_with('/');
        let host = if is_ipv6 { format!("[{host}]") } else { host };
        Self {
            database: format!("{host}:{}/{database}", options.get_port()),
            schemas: options.get_options().and_then(search_path),
        }
    }

    /// Returns host, port and database.
    #[must_use]
    pub fn database(&self) -> &str {
        &self.database
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.database)?;
        self.schemas.iter().try_for_each(|it| write!(f, "?search_path={it}"))
    }
}

/// Returns the last `search_path` that the options of the server's command line set, unless it is `public`.
fn search_path(options: &str) -> Option<String> {
    let mut found = None;
    let mut words = words(options).into_iter();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c") {
            Some("") => words.next(),
            Some(setting) => Some(setting.to_owned()),
            None => word.strip_prefix("--").map(ToOwned::to_owned),
        };
        // The server takes `-` for `_` in a name.
        if let Some((name, value)) = setting.as_deref().and_then(|it| it.split_once('='))
            && name.trim().replace('-', "_").eq_ignore_ascii_case("search_path")
        {
            found = Some(value.split_whitespace().collect::<String>());
        }
    }
    found.filter(|path| !["", "public", "\"public\""].contains(&path.as_str()))
}

/// Splits options at white space that no backslash precedes, as the server does.
fn words(options: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = options.chars();
    while let Some(c) = chars.next() {
        let word = words.len() - 1;
        match c {
            '\\' => words[word].extend(chars.next()),
            c if c.is_ascii_whitespace() => words.push(String::new()),
            c => words[word].push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::{super::connect_options::connect_options, *};

    #[test]
    fn a_location_names_the_schema_unless_it_is_public() {
        for (parameters, schemas) in [
            ("", ""),
            ("?options=-c%20search_path%3Dbroker", "?search_path=broker"),
            ("?options=-csearch_path%3Dbroker", "?search_path=broker"),
            ("?options=--search_path%3Dbroker", "?search_path=broker"),
            ("?options=--search-path%3Dbroker", "?search_path=broker"),
            ("?options[search_path]=broker", "?search_path=broker"),
            ("?options[search_path]=a,%20b", "?search_path=a,b"),
            ("?options=-c%20search_path%3Da%20-c%20search_path%3Db", "?search_path=b"),
            ("?options=-c%20search_path%3Dbroker%20-c%20search_path%3Dpublic", ""),
            ("?options=-c%20search_path%3Dpublic", ""),
            ("?options=-c%20work_mem%3D4MB", ""),
            ("?options=-c%20application_name%3Dsearch_path", ""),
        ] {
            let url = format!("postgresql://jane@db.example/broker{parameters}");
            let location = Location::of(&connect_options(&url, "test").unwrap());
            let expected = format!("db.example:5432/broker{schemas}");
            assert_eq!(location.to_string(), expected, "{parameters}");
            assert_eq!(location.database(), "db.example:5432/broker");
        }
    }
}
