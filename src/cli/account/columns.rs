//! The columns of a file of accounts.

use crate::cli::bulk::{Column, Kind};

/// The columns that `account import` reads. Headers in Korean, and the console's names, are understood too.
pub(super) const COLUMNS: &[Column] = &[
    Column { name: "name", kind: Kind::Text, aliases: &["이름", "account", "계정"] },
    Column {
        name: "client_id",
        kind: Kind::Text,
        aliases: &["clientid", "id", "클라이언트_id", "아이디"],
    },
    Column {
        name: "client_secret",
        kind: Kind::Text,
        aliases: &["clientsecret", "api_key", "apikey", "api_키", "api키"],
    },
    Column { name: "enabled", kind: Kind::Flag, aliases: &["사용"] },
    Column { name: "description", kind: Kind::Text, aliases: &["설명"] },
];
pub(super) const NAME: usize = 0;
pub(super) const CLIENT_ID: usize = 1;
pub(super) const CLIENT_SECRET: usize = 2;
pub(super) const ENABLED: usize = 3;
pub(super) const DESCRIPTION: usize = 4;

/// The columns that `account export` writes: all but the API KEY.
pub(super) const EXPORTED: [&str; 4] = ["name", "client_id", "enabled", "description"];
