//! JSON with one form for each value: what hashes and signatures are made over. The form is that of
//! Python's `json.dumps(value, sort_keys=True, separators=(",", ":"))`, in which the tokens of
//! existing programs are signed: keys by code point, and every character beyond ASCII as `\uXXXX`.

use std::fmt::Write as _;

use ring::digest::{SHA256, digest};
use serde_json::{Number, Value};

/// The canonical text of a value.
#[must_use]
pub fn text(value: &Value) -> String {
    let mut out = String::new();
    write(value, &mut out);
    out
}

/// SHA-256 of the canonical text, in hexadecimal digits.
#[must_use]
pub fn hash(value: &Value) -> String {
    sha256(text(value).as_bytes())
}

/// SHA-256 of bytes, in hexadecimal digits.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(digest(&SHA256, bytes))
}

fn write(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => write_number(number, out),
        Value::String(string) => write_string(string, out),
        Value::Array(values) => {
            let values = values
                .iter()
                .map(|value| |out: &mut String| write(value, out));
            list('[', values, ']', out);
        }
        Value::Object(map) => {
            let mut members: Vec<_> = map.iter().collect();
            // The order of UTF-8 is that of code points.
            members.sort_unstable_by_key(|(key, _)| key.as_str());
            let members = members.into_iter().map(|(key, value)| {
                move |out: &mut String| {
                    write_string(key, out);
                    out.push(':');
                    write(value, out);
                }
            });
            list('{', members, '}', out);
        }
    }
}

fn list<T: FnOnce(&mut String)>(
    open: char,
    items: impl Iterator<Item = T>,
    close: char,
    out: &mut String,
) {
    out.push(open);
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.push(',');
        }
        item(out);
    }
    out.push(close);
}

/// As Python's `repr` has a float: the shortest digits, with an exponent outside of 1e-4 to 1e16.
fn write_number(number: &Number, out: &mut String) {
    let float = number.as_f64().filter(|_| number.is_f64());
    let written = match float {
        None => write!(out, "{number}"),
        Some(0.0) => write!(out, "{:?}", number.as_f64().unwrap_or_default()),
        Some(float) if (1e-4..1e16).contains(&float.abs()) => write!(out, "{float:?}"),
        Some(float) => {
            let scientific = format!("{float:e}");
            let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(exponent) => ('-', exponent),
                None => ('+', exponent),
            };
            write!(out, "{digits}e{sign}{exponent:0>2}")
        }
    };
    written.expect("a string takes everything");
}

fn write_string(string: &str, out: &mut String) {
    out.push('"');
    for character in string.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("a string takes everything");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn values_have_the_form_of_python() {
        for (value, form) in [
            (
                json!({"b": 1, "a": [true, null, "x"]}),
                r#"{"a":[true,null,"x"],"b":1}"#,
            ),
            (
                json!("ü😀\u{7f}\u{1}"),
                r#""\u00fc\ud83d\ude00\u007f\u0001""#,
            ),
            (json!("\"\\\n\r\t\u{8}\u{c}/"), r#""\"\\\n\r\t\b\f/""#),
            (
                json!({"ä": 1, "z": 2, "😀": 3, "\u{ffff}": 4}),
                r#"{"z":2,"\u00e4":1,"\uffff":4,"\ud83d\ude00":3}"#,
            ),
            (
                json!([1.0, -0.0, 1.5, 1e16, 1e15, 1e-5, 0.0001, 1.25e-7, 1e300]),
                "[1.0,-0.0,1.5,1e+16,1000000000000000.0,1e-05,0.0001,1.25e-07,1e+300]",
            ),
            (
                json!([u64::MAX, i64::MIN]),
                "[18446744073709551615,-9223372036854775808]",
            ),
            (json!({}), "{}"),
        ] {
            assert_eq!(text(&value), form);
        }
    }

    #[test]
    fn a_number_is_hashed_as_it_was_written() {
        let number: Value = serde_json::from_str("-4.553103090964823e+185").unwrap();
        assert_eq!(text(&number), "-4.553103090964823e+185");
    }

    proptest! {
        #[test]
        fn a_text_is_ascii_and_reads_as_the_same_value(string in ".*", key in ".*", number: f64) {
            let number = if number.is_finite() { number } else { 0.5 };
            let value = json!({ "a": [string, number], key: 1 });
            let text = text(&value);
            prop_assert!(text.is_ascii());
            prop_assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
        }
    }
}
