use proptest::prelude::*;

use super::*;

const COLUMNS: &[Column] = &[
    Column { name: "name", kind: Kind::Text, aliases: &["이름"] },
    Column { name: "api_key", kind: Kind::Text, aliases: &["key"] },
    Column { name: "enabled", kind: Kind::Flag, aliases: &[] },
    Column { name: "rate", kind: Kind::Number, aliases: &[] },
    Column { name: "grants", kind: Kind::List, aliases: &[] },
];

/// Returns the rows as their line and the values of the columns, where `-` is one that the file does not give.
fn rows(content: &Content) -> Vec<String> {
    let values = |row: &Row| {
        let cells = (0..COLUMNS.len()).map(|column| row.get(column).unwrap_or("-").to_owned());
        format!("{}: {}", row.line, cells.collect::<Vec<_>>().join("|"))
    };
    content.rows.iter().map(values).collect()
}

fn faults(content: &Content) -> Vec<String> {
    content.faults.iter().map(ToString::to_string).collect()
}

#[test]
fn the_forms_of_csv_that_spreadsheets_write_are_read() {
    for text in [
        "name,api_key\na,SK\n",
        "name,api_key\r\na,SK",
        "name,api_key\ra,SK\r",
        "api_key;name\nSK;a\n",
        "Name\tAPI KEY\na\tSK\n",
        "이름,api-key\na,SK\n",
        "\"name\",\"API KEY\"\n\"a\",\"SK\"\n",
        " name , key \na,SK\n,\n\n",
    ] {
        let content = csv::read(text, COLUMNS).unwrap();
        assert_eq!(rows(&content), ["2: a|SK|-|-|-"], "{text:?}");
        assert!(content.faults.is_empty(), "{text:?}");
    }
    let old_mac = csv::read("name,api_key\ra,;;;;\r", COLUMNS).unwrap();
    assert_eq!(rows(&old_mac), ["2: a|;;;;|-|-|-"]);
    let stated = csv::read("sep=;\nname;grants\na;b,c\n", COLUMNS).unwrap();
    assert_eq!(rows(&stated), ["3: a|-|-|-|b,c"]);
    let blank = csv::read("\n\nname;grants\n\na;b,c\n", COLUMNS).unwrap();
    assert_eq!(rows(&blank), ["5: a|-|-|-|b,c"]);
}

#[test]
fn lines_are_counted_across_values_with_line_breaks() {
    let content = csv::read("name,api_key\r\na,\"1\r\n\"\"2\"\"\"\r\nb,\nc\n", COLUMNS).unwrap();
    assert_eq!(rows(&content), ["2: a|1\r\n\"2\"|-|-|-", "4: b||-|-|-"]);
    assert_eq!(faults(&content), ["line 5: it has 1 values, and the first line has 2"]);
}

#[test]
fn a_quotation_mark_in_the_wrong_place_is_a_fault_of_its_row_or_of_the_file() {
    let content = csv::read("name,api_key\na,x\"canary\nb,\"x\"canary\nc,SK\n", COLUMNS).unwrap();
    assert_eq!(rows(&content), ["4: c|SK|-|-|-"]);
    let found = faults(&content);
    assert!(found[0].starts_with("line 2, column api_key: there is a quotation mark"), "{found:?}");
    assert!(found[1].starts_with("line 3, column api_key: there is text after"), "{found:?}");
    for (text, says) in [
        ("name,api_key\na,\"x\nb,canary\n", "line 2, column api_key: a quotation mark is opened"),
        ("name,api_key\na,\"x\nb,\"canary\n", "line 2, column api_key: there is text after"),
        ("name,api_key\na,\"x\n", "line 2, column api_key: a quotation mark is opened"),
    ] {
        let fault = csv::read(text, COLUMNS).unwrap_err().to_string();
        assert!(fault.starts_with(says) && !fault.contains("canary"), "{fault}");
    }
}

#[test]
fn a_first_line_that_does_not_name_the_columns_is_refused_without_being_quoted() {
    for (text, says) in [
        ("", "the first line must name the columns"),
        ("canary,SK.canary\n", "the name of column 1 is unknown"),
        ("name,SK.canary\n", "the name of column 2 is unknown"),
        ("api_key\nSK.canary\n", "name is required"),
        ("name,이름\nSK.canary,\n", "it is there twice"),
        ("name|api_key\na|canary\n", "the name of column 1 is unknown"),
    ] {
        let fault = csv::read(text, COLUMNS).unwrap_err().to_string();
        assert!(fault.contains(says) && !fault.contains("canary"), "{fault}");
    }
}

#[test]
fn json_lines_have_typed_values() {
    let text = "{\"name\":\"a\",\"enabled\":true,\"rate\":5,\"grants\":[\"x\",\"y\"]}\r\n\n\
        {\"name\":\"b\",\"enabled\":null,\"rate\":null,\"grants\":\"x y\"}";
    assert_eq!(
        rows(&json_lines::read(text, COLUMNS).unwrap()),
        ["1: a|-|true|5|x y", "3: b|-|-||x y"]
    );
}

#[test]
fn json_lines_that_are_not_rows_are_faults_without_their_text() {
    for (line, says) in [
        ("canary", "line 1: it is not one JSON object, because of byte 1"),
        ("{\"name\":\"canary\"", "line 1: it is not one JSON object, because of byte 16"),
        ("{\"name\":\"a\"}{\"name\":\"canary\"}", "line 1: it is not one JSON object"),
        ("{\"canary\":1}", "line 1: key 1 is unknown: there are name, api_key"),
        ("{\"name\":\"canary\",\"name\":\"canary\"}", "line 1, column name: it is there twice"),
        ("{\"name\":7}", "line 1, column name: it must be a text"),
        ("{\"api_key\":{\"canary\":1}}", "line 1, column api_key: it must be a text"),
        ("{\"enabled\":1}", "line 1, column enabled: it must be true or false"),
        ("{\"rate\":1.5}", "line 1, column rate: it must be a whole number"),
        ("{\"grants\":[1]}", "line 1, column grants: it must be a list of texts"),
        (
            "{\"grants\":[\"canary x\"]}",
            "line 1, column grants: each text of the list must be one word",
        ),
    ] {
        let found = faults(&json_lines::read(line, COLUMNS).unwrap());
        assert!(found[0].starts_with(says), "{line}: {found:?}");
        assert!(!found[0].contains("canary"), "{found:?}");
    }
    let fault = json_lines::read("\n[\n{\"name\":\"canary\"}]", COLUMNS).unwrap_err().to_string();
    assert!(fault.contains("it is an array") && !fault.contains("canary"), "{fault}");
}

proptest! {
    #[test]
    fn what_is_written_reads_back_the_same(
        written in prop::collection::vec(
            ("[a-z]{1,5}", "[a-z,;\t\"\r\n 가=']{0,12}", any::<bool>(), any::<Option<i32>>(),
                prop::collection::vec("[a-z*=,@:/.]{1,6}", 0..3)),
            0..6,
        )
    ) {
        let names: Vec<_> = COLUMNS.iter().map(|column| column.name).collect();
        for format in [Format::Csv, Format::Jsonl] {
            let cells = written.iter().cloned().map(|(name, key, flag, number, list)| {
                vec![Cell::Text(name), Cell::Text(key), Cell::Flag(flag), Cell::Number(number), Cell::List(list)]
            });
            let text = write(format, &names, cells);
            let content = match format {
                Format::Csv => csv::read(&text, COLUMNS).unwrap(),
                Format::Jsonl => json_lines::read(&text, COLUMNS).unwrap(),
            };
            prop_assert!(content.faults.is_empty(), "{text}: {:?}", content.faults);
            let read: Vec<Vec<_>> = content.rows.iter()
                .map(|row| (0..5).map(|column| row.get(column).unwrap().to_owned()).collect())
                .collect();
            let expected: Vec<Vec<_>> = written.iter()
                .map(|(name, key, flag, number, list)| vec![
                    name.clone(), key.clone(), flag.to_string(),
                    number.map(|number| number.to_string()).unwrap_or_default(), list.join(" "),
                ])
                .collect();
            prop_assert_eq!(read, expected);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[a-z,;\t\"\r\n]{0,40}") {
        let _ = csv::read(&format!("name,api_key\n{text}"), COLUMNS);
        let _ = csv::read(&text, COLUMNS);
        let _ = json_lines::read(&text, COLUMNS);
    }
}
