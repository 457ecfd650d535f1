//! A TOML file with the place of every key and value.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::place::Position;

/// A value and where it stands in the text, bytes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Item {
    pub(crate) span: Range<usize>,
    pub(crate) node: Node,
}

/// A value as TOML knows it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    Table(Vec<Entry>),
    Array(Vec<Item>),
    Text(String),
    Integer(i64),
    /// A whole number beyond 64 bits, as it is written.
    HugeInteger(String),
    Float(f64),
    Boolean(bool),
    Datetime(String),
}

/// A key of a table with its value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) key_span: Range<usize>,
    pub(crate) item: Item,
}

/// Why a text is no TOML.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    pub(crate) message: String,
    pub(crate) span: Range<usize>,
}

/// A parsed text.
#[derive(Debug, Clone)]
pub(crate) struct Document {
    text: String,
    pub(crate) root: Item,
}

impl Document {
    pub(crate) fn parse(text: String) -> Result<Self, SyntaxError> {
        let root = match DeTable::parse(&text) {
            Ok(table) => {
                let span = table.span();
                Item { span, node: table_node(table.into_inner()) }
            }
            Err(error) => {
                let span = error.span().unwrap_or(0..0);
                return Err(SyntaxError { message: error.message().to_owned(), span });
            }
        };
        Ok(Self { text, root })
    }

    /// The value of a dotted key, with indices as in `adapter.target_modules[1]`.
    pub(crate) fn item(&self, key: &str) -> Option<&Item> {
        let mut item = &self.root;
        for part in key.split('.') {
            let (name, indices) = part.split_once('[').map_or((part, ""), |(name, rest)| (name, rest));
            item = &entry_of(item, name)?.item;
            for index in indices.split('[').filter(|index| !index.is_empty()) {
                let index: usize = index.trim_end_matches(']').parse().ok()?;
                let Node::Array(items) = &item.node else { return None };
                item = items.get(index)?;
            }
        }
        Some(item)
    }

    /// Where the name of a dotted key stands: for a table the header that opens it.
    pub(crate) fn key_span(&self, key: &str) -> Option<Range<usize>> {
        let (parent, name) = key.rsplit_once('.').map_or((None, key), |(parent, name)| (Some(parent), name));
        let table = match parent {
            Some(parent) => self.item(parent)?,
            None => &self.root,
        };
        entry_of(table, name).map(|entry| entry.key_span.clone())
    }

    /// Where to point for a dotted key: at its value, else at the innermost table that would hold it.
    pub(crate) fn nearest_span(&self, key: &str) -> Option<Range<usize>> {
        if let Some(item) = self.item(key) {
            return match item.node {
                Node::Table(_) => self.key_span(key),
                _ => Some(item.span.clone()),
            };
        }
        let mut parent = key;
        while let Some((shorter, _)) = parent.rsplit_once(['.', '[']) {
            parent = shorter;
            if let Some(span) = self.key_span(parent) {
                return Some(span);
            }
        }
        None
    }

    pub(crate) fn position(&self, span: &Range<usize>) -> Position {
        position_in(&self.text, span)
    }
}

/// Line and column (characters, from 1) of a range of bytes; what lies beyond the first line's end is left out.
pub(crate) fn position_in(text: &str, span: &Range<usize>) -> Position {
    let start = floor_boundary(text, span.start);
    let end = floor_boundary(text, span.end).max(start);
    let before = &text[..start];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let at_fault = text[start..end].lines().next().unwrap_or("");
    Position {
        line: before.matches('\n').count() + 1,
        column: text[line_start..start].chars().count() + 1,
        width: at_fault.chars().count().max(1),
    }
}

fn floor_boundary(text: &str, mut index: usize) -> usize {
    index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}

pub(crate) fn entry_of<'a>(item: &'a Item, key: &str) -> Option<&'a Entry> {
    match &item.node {
        Node::Table(entries) => entries.iter().find(|entry| entry.key == key),
        _ => None,
    }
}

fn table_node(table: DeTable<'_>) -> Node {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, value)| {
            let span = value.span();
            Entry {
                key_span: key.span(),
                key: key.into_inner().into_owned(),
                item: Item { span, node: node(value.into_inner()) },
            }
        })
        .collect();
    entries.sort_by_key(|entry| entry.key_span.start);
    Node::Table(entries)
}

fn node(value: DeValue<'_>) -> Node {
    match value {
        DeValue::String(text) => Node::Text(text.into_owned()),
        DeValue::Integer(integer) => {
            let digits = integer.as_str().replace('_', "");
            match i64::from_str_radix(&digits, integer.radix()) {
                Ok(value) => Node::Integer(value),
                Err(_) => Node::HugeInteger(digits),
            }
        }
        DeValue::Float(float) => {
            // TOML's floats are a subset of what Rust reads; `nan` is what is left if that ever changes.
            Node::Float(float.as_str().replace('_', "").parse().unwrap_or(f64::NAN))
        }
        DeValue::Boolean(value) => Node::Boolean(value),
        DeValue::Datetime(value) => Node::Datetime(value.to_string()),
        DeValue::Array(items) => Node::Array(
            items
                .into_iter()
                .map(|value| Item { span: value.span(), node: node(value.into_inner()) })
                .collect(),
        ),
        DeValue::Table(table) => table_node(table),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str, key: &str) -> (usize, usize, usize) {
        let document = Document::parse(text.to_owned()).expect("valid TOML");
        let span = document.nearest_span(key).expect("a place");
        let position = document.position(&span);
        (position.line, position.column, position.width)
    }

    #[test]
    fn values_are_found_in_tables_inline_tables_dotted_keys_and_arrays() {
        assert_eq!(at("[train]\nsteps = 12\n", "train.steps"), (2, 9, 2));
        assert_eq!(at("[cluster]\nworkers = { min = 1, max = 30 }\n", "cluster.workers.max"), (2, 28, 2));
        assert_eq!(at("train.steps = 5\n", "train.steps"), (1, 15, 1));
        assert_eq!(at("[a]\nt = [\n  \"x\",\n  \"yy\",\n]\n", "a.t[1]"), (4, 3, 4));
        assert_eq!(at("[[a]]\nb = 1\n[[a]]\nb = 22\n", "a[1].b"), (4, 5, 2));
    }

    #[test]
    fn an_absent_key_is_shown_at_the_header_of_its_table() {
        assert_eq!(at("x = 1\n[train]\nseed = 1\n", "train.steps"), (2, 2, 5));
        assert_eq!(at("x = 1\n[a.train]\nseed = 1\n", "a.train.steps.more"), (2, 4, 5));
        assert!(Document::parse("x = 1".to_owned()).expect("valid").nearest_span("train.steps").is_none());
    }

    #[test]
    fn columns_count_characters_and_a_long_value_ends_at_its_line() {
        assert_eq!(at("\"ключ\" = 7\n", "ключ"), (1, 10, 1));
        assert_eq!(at("a = \"\"\"one\ntwo\"\"\"\n", "a"), (1, 5, 6));
    }
}
