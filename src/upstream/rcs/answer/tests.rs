use std::io::Write;

use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use http::header::{self, HeaderName};
use proptest::prelude::*;

use super::*;
use crate::upstream::rcs::body::MAX_BODY;

const TOKEN: &str = r#"{"expiresIn":"1717138601944","accessToken":"t.o.k"}"#;
const REFUSAL: &str = r#"{"error":{"code":"61006","message":"잘못된 비밀 키"},"status":401}"#;

fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(name.clone(), value.parse().unwrap());
    }
    headers
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(vec![], Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(vec![], Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn raw_deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(vec![], Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn utf16(text: &str, bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(bytes).collect()
}

fn utf32(text: &str, bytes: fn(u32) -> [u8; 4]) -> Vec<u8> {
    text.chars().map(u32::from).flat_map(bytes).collect()
}

/// What is read of `body`: `token`, the code of a refusal, or the reason why nothing is.
fn read_as(coding: &str, body: &[u8]) -> String {
    let headers = headers(&[(header::CONTENT_ENCODING, coding)]);
    match read(&headers, body) {
        Err(unreadable) => unreadable.to_string(),
        Ok(Answer { error: Some(error), .. }) => error.code.unwrap_or_default(),
        Ok(answer) => {
            assert!(!answer.access_tokens.is_empty() && !answer.ends.is_empty());
            assert!(answer.access_tokens.iter().all(|token| token.as_str() == r#""t.o.k""#));
            assert!(answer.ends.iter().all(|end| end == r#""1717138601944""#));
            "token".to_owned()
        }
    }
}

/// The forms in which a JSON text can arrive: the name of the form, the content coding, and the bytes.
fn forms(text: &str) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let bytes = text.as_bytes();
    let marked = format!("\u{feff}{text}");
    let string = serde_json::to_string(text).unwrap();
    vec![
        ("UTF-8", "", bytes.to_vec()),
        ("UTF-8 with a mark", "", marked.clone().into_bytes()),
        ("two marks", "", format!("\u{feff}{marked}").into_bytes()),
        ("white space before a mark", "", format!("\r\n{marked}\r\n").into_bytes()),
        ("a misread mark", "", format!("ï»¿{text}").into_bytes()),
        ("UTF-16LE with a mark", "", utf16(&marked, u16::to_le_bytes)),
        ("UTF-16BE with a mark", "", utf16(&marked, u16::to_be_bytes)),
        ("UTF-16LE", "", utf16(text, u16::to_le_bytes)),
        ("UTF-16BE", "", utf16(text, u16::to_be_bytes)),
        ("UTF-32LE with a mark", "", utf32(&marked, u32::to_le_bytes)),
        ("UTF-32BE with a mark", "", utf32(&marked, u32::to_be_bytes)),
        ("UTF-32LE", "", utf32(text, u32::to_le_bytes)),
        ("UTF-32BE", "", utf32(text, u32::to_be_bytes)),
        ("white space around it", "", format!("\n\n  {text}\r\n\t ").into_bytes()),
        ("zeros of C after it", "", format!("{text}\0\0").into_bytes()),
        ("a record of RFC 7464", "", format!("\u{1e}{text}\n").into_bytes()),
        ("a string with the document", "", string.clone().into_bytes()),
        ("a string with a mark", "", format!("\u{feff}{string}").into_bytes()),
        ("a list of one", "", format!("[{text}]").into_bytes()),
        ("a list of a list", "", format!("[[{text}]]").into_bytes()),
        ("a list with null", "", format!("[null,{text}]").into_bytes()),
        ("a list with a number", "", format!("[401, {text}]").into_bytes()),
        ("a list with empty values", "", format!("[{{ }},[],\"\",{text},{{}}]").into_bytes()),
        ("a list of a string", "", format!("[{string}]").into_bytes()),
        ("a string with a list", "", serde_json::to_vec(&format!("[{text}]")).unwrap()),
        ("a string with a string", "", serde_json::to_vec(&string).unwrap()),
        ("a guard against scripts", "", format!(")]}}',\n{text}").into_bytes()),
        ("another guard", "", format!("while(1);{text}").into_bytes()),
        ("gzip", "gzip", gzip(bytes)),
        ("gzip by its old name", "X-GZip", gzip(bytes)),
        ("gzip that no header names", "", gzip(bytes)),
        ("gzip that is called br", "br", gzip(bytes)),
        ("gzip twice", "gzip, gzip", gzip(&gzip(bytes))),
        ("gzip three times, named once", "gzip", gzip(&gzip(&gzip(bytes)))),
        ("gzip four times", "", gzip(&gzip(&gzip(&gzip(bytes))))),
        ("gzip in two members", "gzip", [gzip(&bytes[..9]), gzip(&bytes[9..])].concat()),
        ("gzip of UTF-16 with a mark", "gzip", gzip(&utf16(&marked, u16::to_le_bytes))),
        ("gzip with a newline after it", "gzip", [&gzip(bytes)[..], b"\n"].concat()),
        ("gzip with zeros after it", "gzip", [&gzip(bytes)[..], &[0; 9]].concat()),
        ("UTF-16LE and a newline", "", [&utf16(text, u16::to_le_bytes)[..], b"\n"].concat()),
        ("UTF-16BE and a newline", "", [&utf16(text, u16::to_be_bytes)[..], b"\r\n"].concat()),
        ("UTF-16LE and CR LF", "", [&utf16(text, u16::to_le_bytes)[..], b"\r\n"].concat()),
        (
            "a newline, then UTF-16",
            "",
            [&b"\n"[..], &utf16(&marked, u16::to_le_bytes)[..]].concat(),
        ),
        ("deflate", "deflate", zlib(bytes)),
        ("deflate without a header", "deflate", raw_deflate(bytes)),
        ("deflate that no header names", "", zlib(bytes)),
        ("deflate without a header that no header names", "", raw_deflate(bytes)),
        ("deflate of UTF-16", "", zlib(&utf16(text, u16::to_be_bytes))),
        ("deflate that is called gzip", "gzip", zlib(bytes)),
        ("deflate, then gzip", "deflate, gzip", gzip(&zlib(bytes))),
        ("deflate without a header, then gzip", "", gzip(&raw_deflate(bytes))),
        ("gzip, then deflate", "gzip,deflate", zlib(&gzip(bytes))),
        ("plain, called identity", "identity", bytes.to_vec()),
        ("plain, called gzip", "gzip", bytes.to_vec()),
        ("plain, called deflate", "deflate", bytes.to_vec()),
        ("plain, called br", "br", bytes.to_vec()),
    ]
}

#[test]
fn a_token_and_a_refusal_are_read_in_every_form() {
    for (text, expected) in [(TOKEN, "token"), (REFUSAL, "61006")] {
        for (form, coding, bytes) in forms(text) {
            assert_eq!(read_as(coding, &bytes), expected, "{form}");
        }
    }
}

#[test]
fn the_fields_are_read_although_a_message_is_in_another_encoding() {
    for (encoding, message) in [
        ("EUC-KR", &b"\xc0\xdf\xb8\xf8\xb5\xc8 \xc5\xb0"[..]),
        ("CP949 with ASCII in its characters", b"\x8cA\x8cZ\xc0\xdfa"),
        ("Latin-1", b"cl\xe9 refus\xe9e"),
        ("Windows-1252", b"\x93key\x94 \x80"),
        ("half a character of UTF-8", b"\xec\x9e"),
        ("control characters that are not escaped", b"two\r\nlines\t\0\x1b"),
        ("a surrogate in UTF-8", b"\xed\xa0\x80"),
    ] {
        let body = [br#"{"error":{"message":""#, message, br#"","code":"61006"}}"#].concat();
        assert_eq!(read_as("", &body), "61006", "{encoding}");
    }
}

#[test]
fn escapes_that_json_does_not_have_lose_no_code() {
    for message in [r"it\'s", r"\x41", r"\q \ \u12 \u+123 \uzzzz", r"C:\새\dir", r#"a\\\" \/ \'"#]
    {
        let body = format!(r#"{{"error":{{"message":"{message}","code":"61006"}}}}"#);
        assert_eq!(read_as("", body.as_bytes()), "61006", "{message}");
        let wrapped = serde_json::to_vec(&body).unwrap();
        assert_eq!(read_as("", &wrapped), "61006", "{message}");
    }
    // A token does not become another one by it.
    for (written, read_as) in [
        (r"t\.o.k", "t\u{fffd}.o.k"),
        (r"\x74.o.k", "\u{fffd}x74.o.k"),
        (r"\u74t.o.k\ud83d", "\u{fffd}u74t.o.k\u{fffd}"),
    ] {
        let body = format!(r#"{{"accessToken":"{written}","expiresIn":"1717138601944"}}"#);
        let Ok(answer) = read(&HeaderMap::new(), body.as_bytes()) else { panic!("{written}") };
        assert_eq!(answer.access_tokens[0].as_str(), format!("\"{read_as}\""));
    }
}

#[test]
fn the_code_of_a_refusal_is_found_wherever_writers_and_gateways_put_it() {
    for body in [
        r#"{"error":{"code":"61006","message":"cut \ud83d"}}"#,
        r#"{"error":{"message":"\udc00\ud83d\ud83d\\\ud83d","code":"61006","n":1e400}}"#,
        r#""{\"error\":{\"message\":\"\\ud83d\",\"code\":61006}}""#,
        r#"{"error":{"code":"61006"},"error":null}"#,
        r#"{"error":{},"error":{"code":"61006"}}"#,
        r#"{"code":"61006","message":"canary"}"#,
        r#"{"code":61006,"error":"Unauthorized"}"#,
        r#"{"error":{"error":{"code":"61006"}}}"#,
        r#"{"error":[{"code":"61006"}]}"#,
        r#"{"errors":[{"code":"61006"}]}"#,
        r#"{"error":"61006"}"#,
        r#"{"error":61006}"#,
        r#"{"error":"{\"error\":{\"code\":\"61006\"}}"}"#,
        r#"{"error":{"code":["61006"]}}"#,
        r#"{"error":{"code":"0061006"}}"#,
        r#"{"error":{"code":"61006 Invalid secret"}}"#,
        r#"{"error":{"code":"61006:INVALID"}}"#,
        r#"{"error":{"code":"6.1006e4"}}"#,
        r#"{"error":{"code":"61006.0"}}"#,
        r#"[{"error":{"code":"61006"}}]"#,
        // Of a field that is repeated, the last value that says something counts.
        r#"{"error":{"code":"61006","code":null},"status":401}"#,
        r#"{"error":{"code":"61006","code":""}}"#,
        r#"{"error":{"code":"61006","code":"0"}}"#,
        r#"{"error":{"code":"61005","code":"61006","code":[]}}"#,
        r#"{"code":"61006","code":null,"status":401}"#,
        r#"{"status":401,"status":null,"code":"61006","code":""}"#,
        r#"{"error":{"code":null,"error":{"code":"61006"}}}"#,
        r#"{"error":{"error":{"code":"61006"},"error":null}}"#,
        // Prefixes and signs.
        r#"{"error":{"code":"RCS-61006"}}"#,
        r#"{"error":{"code":"E61006"}}"#,
        r#"{"error":{"code":"ERR_61006_2024"}}"#,
        r#"{"error":{"code":-61006}}"#,
        r#"{"error":{"code":"[61006]"}}"#,
        r#"{"error":{"code":"\"61006\""}}"#,
        r#"{"error":{"code":"\u200b61006\u2060"}}"#,
        r#"{"error":"RCS-61006: canary"}"#,
        // What gateways wrap around it.
        r#"{"data":{"error":{"code":"61006"}}}"#,
        r#"{"detail":{"code":"61006"}}"#,
        r#"{"fault":{"code":61006}}"#,
        r#"{"error":{"errorCode":"61006"}}"#,
        r#"{"error":"Unauthorized","error_code":"61006"}"#,
        r#"{"resultCode":"61006","resultMessage":"canary"}"#,
        r#"{"ERROR":{"CODE":"61006"},"STATUS":401}"#,
        r#"{"error ":{"code ":"61006"}}"#,
        r#"{"\ufefferror":{"\ufeffcode":"61006"}}"#,
        r#"{"statusCode":401,"body":"{\"error\":{\"code\":\"61006\"}}"}"#,
        r#"{"errors":[{"detail":{"code":"61006"}},{"detail":{"code":"61006"}}]}"#,
        r#"{"accessToken":null,"expiresIn":"","result":{"code":"61006"}}"#,
        // A token beside it does not count.
        r#"{"code":"61006","accessToken":"t.o.k","expiresIn":"1717138601944"}"#,
    ] {
        assert_eq!(read_as("", body.as_bytes()), "61006", "{body}");
    }
    for without_code in [
        r#"{"error":[{"code":"61006"},{"code":"61005"}]}"#,
        r#"{"error":"canary 61006"}"#,
        r#"{"error":{"message":"61006"}}"#,
        r#"{"error":{"errorCode":"61006","subCode":"61005"}}"#,
        r#"{"error":{"message":"canary"},"zip":"61006"}"#,
        r#"{"error":{"errorCode":"401"}}"#,
    ] {
        assert_eq!(read_as("", without_code.as_bytes()), "", "{without_code}");
    }
    let deep = format!("{}61006{}", r#"{"error":"#.repeat(9), "}".repeat(9));
    assert_eq!(read_as("", deep.as_bytes()), "");
}

#[test]
fn what_states_no_error_loses_no_token() {
    for beside in [
        r#""error":"OK""#,
        r#""error":"ok.""#,
        r#""error":"No error""#,
        r#""error":"NO_ERROR""#,
        r#""error":"N""#,
        r#""error":"no""#,
        r#""error":"N/A""#,
        r#""error":"-""#,
        r#""error":"Success""#,
        r#""error":"정상""#,
        r#""error":["OK"]"#,
        r#""error":{"code":"OK"}"#,
        r#""error":{"code":"SUCCESS","message":"정상 처리되었습니다"}"#,
        r#""error":{"code":"","message":"Success"}"#,
        r#""error":{"message":"success"}"#,
        r#""error":{"code":{}}"#,
        r#""errors":{},"error":[]"#,
        r#""accessToken":null"#,
        r#""accessToken":"","expiresIn":null"#,
        r#""error":"None""#,
        r#""error":" none ""#,
        r#""error":"false""#,
        r#""error": "" "#,
        r#""errors":[]"#,
        r#""error":{"code":200,"message":"success"}"#,
        r#""code":200,"message":"success""#,
        r#""code":"20000""#,
        r#""code":"OK""#,
        r#""accessToken":"t.o.k""#,
    ] {
        let body = format!(r#"{{"expiresIn":"1717138601944","accessToken":"t.o.k",{beside}}}"#);
        assert_eq!(read_as("", body.as_bytes()), "token", "{beside}");
    }
    // A message whose characters were lost, and words that only contain one of success.
    for beside in ["??? ??", "\u{fffd}\u{fffd}", "not ok", "no such key", "!"] {
        let token = r#""expiresIn":"1717138601944","accessToken":"t.o.k""#;
        let body = format!(r#"{{{token},"error":"{beside}"}}"#);
        assert_eq!(read_as("", body.as_bytes()), "", "{beside}");
    }
}

#[test]
fn what_is_no_single_whole_object_is_not_read() {
    let not_json = "the upstream's answer is not whole JSON";
    for body in [
        "",
        "\u{feff}",
        "null",
        "true",
        "61006",
        "[]",
        "[1]",
        r#"[{"accessToken":"canary"},{"expiresIn":1}]"#,
        r#"[[[[[{"accessToken":"canary"}]]]]]"#,
        r#"["canary","1717138601944"]"#,
        r#""""#,
        r#""canary""#,
        r#"{"accessToken":"canary""#,
        r#"{"accessToken":"canary"}}"#,
        r#"{"accessToken":"canary"}{}"#,
        r#"{"accessToken":"canary"} canary"#,
        r#"{"accessToken":"canary",}"#,
        r"{'accessToken':'canary'}",
        r#"{accessToken:"canary"}"#,
        r#"canary({"accessToken":"canary"})"#,
        "accessToken=canary&expiresIn=1717138601944",
        "<html><body>{\"accessToken\":\"canary\"}</body></html>",
        "<token>canary</token>",
    ] {
        assert_eq!(read_as("", body.as_bytes()), not_json, "{body}");
    }
    // A byte is missing, or changed.
    for (coding, bytes) in [
        ("gzip", gzip(TOKEN.as_bytes())),
        ("deflate", zlib(TOKEN.as_bytes())),
        ("", zlib(TOKEN.as_bytes())),
    ] {
        let damaged = "the upstream's compressed answer is damaged or longer than 64 KiB";
        assert_eq!(read_as(coding, &bytes[..bytes.len() - 1]), damaged, "{coding}");
        let mut changed = bytes.clone();
        *changed.last_mut().unwrap() ^= 1;
        assert_eq!(read_as(coding, &changed), damaged, "{coding}");
    }
    let odd = [&utf16(TOKEN, u16::to_le_bytes)[..], b"x"].concat();
    assert_eq!(read_as("", &odd), not_json);
}

#[test]
fn a_compression_that_is_not_known_is_named() {
    for (coding, named) in [
        ("br", "br"),
        ("zstd", "zstd"),
        ("compress", "compress"),
        ("canary", "an unknown coding"),
        ("gzip, br", "br"),
    ] {
        let expected =
            format!("the upstream's answer is compressed ({named}), which was not asked for");
        assert_eq!(read_as(coding, b"\x0b\x02\x80{}\x03"), expected, "{coding}");
    }
}

#[test]
fn an_answer_is_not_inflated_beyond_the_limit() {
    let bomb = vec![b' '; 100 * MAX_BODY];
    let refused = "the upstream's compressed answer is damaged or longer than 64 KiB";
    assert_eq!(read_as("gzip", &gzip(&bomb)), refused);
    assert_eq!(read_as("gzip, gzip", &gzip(&gzip(&bomb))), refused);
    assert_eq!(read_as("deflate", &zlib(&bomb)), refused);
    let longest = format!("{TOKEN}{}", " ".repeat(MAX_BODY - TOKEN.len()));
    assert_eq!(read_as("gzip", &gzip(longest.as_bytes())), "token");
    assert_eq!(read_as("gzip", &gzip(format!("{longest} ").as_bytes())), refused);
}

proptest! {
    #[test]
    fn no_bytes_under_any_coding_make_the_reader_panic(
        coding in "(gzip|deflate|br|identity|, ){0,6}",
        body in proptest::collection::vec(any::<u8>(), 0..60),
        form in 0_usize..usize::MAX,
    ) {
        let _ = read_as(&coding, &body);
        // A form that is cut or changed at a place is read as what it is, or not at all.
        let mut forms = forms(REFUSAL);
        let form = form % forms.len();
        let (_, coding, mut bytes) = forms.swap_remove(form);
        if let (Some(at), Some(byte)) = (body.first(), body.get(1)) {
            let at = usize::from(*at) % bytes.len();
            bytes[at] = *byte;
            let headers = headers(&[(header::CONTENT_ENCODING, coding)]);
            if let Ok(answer) = read(&headers, &bytes) {
                prop_assert!(answer.access_tokens.is_empty());
            }
        }
    }
}
