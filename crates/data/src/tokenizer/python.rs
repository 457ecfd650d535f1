//! What chat templates expect of Python: `tojson` as `json.dumps` writes, and `strftime`.

use minijinja::{
    Error, ErrorKind,
    value::{Kwargs, Value, ValueKind},
};

/// `json.dumps(value, ensure_ascii=False, indent=…)`: as transformers defines the filter `tojson`.
pub(super) fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    // Accepted as transformers does; only the defaults are implemented.
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    if ensure_ascii || sort_keys {
        let reason = "tojson knows neither ensure_ascii=true nor sort_keys=true";
        return Err(Error::new(ErrorKind::InvalidOperation, reason));
    }
    let mut out = String::new();
    write_json(&mut out, value, indent, 0)?;
    Ok(out)
}

fn write_json(out: &mut String, value: &Value, indent: Option<usize>, depth: usize) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::Map => {
            out.push('{');
            let mut first = true;
            for key in value.try_iter()? {
                separate(out, &mut first, indent, depth + 1);
                quote(out, &key.to_string())?;
                out.push_str(": ");
                write_json(out, &value.get_item(&key)?, indent, depth + 1)?;
            }
            close(out, first, indent, depth, '}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut first = true;
            for item in value.try_iter()? {
                separate(out, &mut first, indent, depth + 1);
                write_json(out, &item, indent, depth + 1)?;
            }
            close(out, first, indent, depth, ']');
        }
        _ => quote(out, &value.to_string())?,
    }
    Ok(())
}

fn separate(out: &mut String, first: &mut bool, indent: Option<usize>, depth: usize) {
    if !std::mem::take(first) {
        out.push_str(if indent.is_some() { "," } else { ", " });
    }
    new_line(out, indent, depth);
}

fn close(out: &mut String, empty: bool, indent: Option<usize>, depth: usize, bracket: char) {
    if !empty {
        new_line(out, indent, depth);
    }
    out.push(bracket);
}

fn new_line(out: &mut String, indent: Option<usize>, depth: usize) {
    if let Some(indent) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent * depth));
    }
}

fn quote(out: &mut String, text: &str) -> Result<(), Error> {
    let quoted = serde_json::to_string(text)
        .map_err(|source| Error::new(ErrorKind::BadSerialization, "string").with_source(source))?;
    out.push_str(&quoted);
    Ok(())
}

/// From JSON, keeping the order of keys.
pub(super) fn from_json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(value) => match (value.as_i64(), value.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(value.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(value) => Value::from(value.as_str()),
        serde_json::Value::Array(values) => values.iter().map(from_json).collect(),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), from_json(value))))
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `datetime.strftime` in the C locale, UTC, for the directives that chat templates use.
pub(super) fn strftime(seconds: i64, format: &str) -> Result<String, Error> {
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = rest.next();
        let padded = directive != Some('-');
        if !padded {
            directive = rest.next();
        }
        let two = |number: i64| if padded { format!("{number:02}") } else { number.to_string() };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year.rem_euclid(100)),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                let reason = format!("strftime_now does not know %{other}");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970-01-01. Howard Hinnant, "chrono-compatible low-level date algorithms".
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // date -u -d @1732438061
        let format = "%A %a %d %-d %B %b %m %Y %y %H:%M:%S %I %p %% %F %T";
        assert_eq!(
            strftime(1_732_438_061, format).unwrap(),
            "Sunday Sun 24 24 November Nov 11 2024 24 08:47:41 08 AM % 2024-11-24 08:47:41"
        );
        // Python: datetime(2000, 2, 29) and the day before the epoch.
        assert_eq!(strftime(951_782_400, "%d %b %Y").unwrap(), "29 Feb 2000");
        assert_eq!(strftime(-1, "%a %-d %b %Y %I%p").unwrap(), "Wed 31 Dec 1969 11PM");
        assert!(strftime(0, "%Q").is_err());
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let value: serde_json::Value =
            serde_json::from_str(r#"{"b": [1, 2.5, true, null], "a": "é<\"&'", "e": {}, "f": []}"#).unwrap();
        let value = from_json(&value);
        // json.dumps(value, ensure_ascii=False) of the same object.
        let compact = tojson(&value, None, Kwargs::from_iter(Vec::<(String, Value)>::new())).unwrap();
        assert_eq!(compact, r#"{"b": [1, 2.5, true, null], "a": "é<\"&'", "e": {}, "f": []}"#);
        let indented = tojson(&value, Some(2), Kwargs::from_iter(Vec::<(String, Value)>::new())).unwrap();
        assert_eq!(
            indented,
            "{\n  \"b\": [\n    1,\n    2.5,\n    true,\n    null\n  ],\n  \"a\": \"é<\\\"&'\",\n  \"e\": {},\n  \"f\": []\n}"
        );
    }
}
