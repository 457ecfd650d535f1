//! Holds a parsed value against the shape that its key may have, and hands it on to the `config` crate.

use std::ops::Range;

use config::{Map, Value};

use crate::{
    document::{Item, Node},
    error::Error,
    place::Place,
    shape::{Shape, join_key, quoted},
    suggest,
};

/// One layer on its way from text to typed values.
pub(crate) struct Checker<'a> {
    /// The shape of the whole file.
    pub(crate) root: &'a Shape,
    /// Where a range of the layer's text is.
    pub(crate) place: &'a dyn Fn(&Range<usize>) -> Place,
    pub(crate) errors: &'a mut Vec<Error>,
}

impl Checker<'_> {
    /// The value as the `config` crate takes it; none where it was refused.
    pub(crate) fn value(&mut self, key: &str, item: &Item, shape: &Shape) -> Option<Value> {
        let kind: Value = match (shape, &item.node) {
            (Shape::Table(_), Node::Table(_)) => return self.table(key, item, shape),
            (Shape::Integer { max } | Shape::WordsOrInteger { max, .. }, Node::Integer(value)) => {
                self.integer(key, item, *value, *max)?
            }
            (
                Shape::Integer { .. } | Shape::WordsOrInteger { .. } | Shape::Number,
                Node::HugeInteger(digits),
            ) => {
                return self.impossible(key, item, digits, &format!("must be at most {}", i64::MAX));
            }
            (Shape::Number, Node::Integer(value)) => (*value).into(),
            (Shape::Number, Node::Float(value)) => (*value).into(),
            (Shape::Boolean, Node::Boolean(value)) => (*value).into(),
            (Shape::Text | Shape::Path | Shape::TextOrList | Shape::TextOrTables(_), Node::Text(text)) => {
                text.as_str().into()
            }
            (Shape::Words(_) | Shape::WordsOrInteger { .. }, Node::Text(word)) => {
                self.word(key, item, word, shape)?
            }
            (Shape::Numbers(length), Node::Array(items)) if items.len() == *length => {
                self.list(key, items, &Shape::Number)?
            }
            (Shape::Numbers(_), Node::Array(items)) => {
                return self.wrong_type(key, item, shape, format!("a list of {}", items.len()));
            }
            (Shape::TextOrList, Node::Array(items)) => self.list(key, items, &Shape::Text)?,
            (Shape::TextOrTables(table), Node::Array(items)) => {
                self.list(key, items, &Shape::Table(table.clone()))?
            }
            (Shape::Integers { max }, Node::Array(items)) => {
                self.list(key, items, &Shape::Integer { max: *max })?
            }
            (Shape::NumbersByName, Node::Table(entries)) => {
                let mut map = Vec::new();
                for entry in entries {
                    let value = self.value(&join_key(key, &entry.key), &entry.item, &Shape::Number)?;
                    map.push((entry.key.clone(), value));
                }
                map.into_iter().collect::<Map<String, Value>>().into()
            }
            _ => return self.wrong_type(key, item, shape, found(&item.node)),
        };
        Some(kind)
    }

    fn table(&mut self, key: &str, item: &Item, shape: &Shape) -> Option<Value> {
        let Node::Table(entries) = &item.node else { return None };
        let mut map = Map::new();
        for entry in entries {
            let child = join_key(key, &entry.key);
            match shape.fields().iter().find(|field| field.key == entry.key) {
                Some(field) => {
                    if let Some(value) = self.value(&child, &entry.item, &field.shape) {
                        map.insert(entry.key.clone(), value);
                    }
                }
                None => self.errors.push(Error::UnknownKey {
                    hint: unknown_key_hint(self.root, key, &entry.key),
                    key: child,
                    place: (self.place)(&entry.key_span),
                }),
            }
        }
        Some(map.into())
    }

    fn list(&mut self, key: &str, items: &[Item], shape: &Shape) -> Option<Value> {
        let values: Vec<Value> = items
            .iter()
            .enumerate()
            .filter_map(|(index, item)| self.value(&format!("{key}[{index}]"), item, shape))
            .collect();
        (values.len() == items.len()).then(|| values.into())
    }

    fn integer(&mut self, key: &str, item: &Item, value: i64, max: i64) -> Option<Value> {
        if value < 0 {
            return self.impossible(key, item, &value.to_string(), "must not be negative");
        }
        if value > max {
            return self.impossible(key, item, &value.to_string(), &format!("must be at most {max}"));
        }
        Some(value.into())
    }

    fn word(&mut self, key: &str, item: &Item, word: &str, shape: &Shape) -> Option<Value> {
        let words = shape.words();
        if words.iter().any(|known| known.word == word) {
            return Some(word.into());
        }
        let known = || words.iter().map(|known| known.word.as_str());
        self.errors.push(Error::UnknownWord {
            key: key.to_owned(),
            value: word.to_owned(),
            words: quoted(known()),
            hint: Some(match suggest::closest(word, known()) {
                Some(close) => format!("did you mean `{close}`?"),
                None => "docs/reference/job.md says what each of them does".to_owned(),
            }),
            place: (self.place)(&item.span),
        });
        None
    }

    fn impossible(&mut self, key: &str, item: &Item, value: &str, rule: &str) -> Option<Value> {
        self.errors.push(Error::Impossible {
            key: key.to_owned(),
            value: value.to_owned(),
            rule: rule.to_owned(),
            hint: None,
            place: (self.place)(&item.span),
        });
        None
    }

    fn wrong_type(&mut self, key: &str, item: &Item, shape: &Shape, found: String) -> Option<Value> {
        self.errors.push(Error::WrongType {
            key: key.to_owned(),
            expected: shape.expected(),
            found,
            hint: type_hint(key, item, shape),
            place: (self.place)(&item.span),
        });
        None
    }
}

/// What to say about a key that is not there: the one that was meant, else those that there are.
pub(crate) fn unknown_key_hint(root: &Shape, parent: &str, key: &str) -> Option<String> {
    let Some(meant) = suggest::closest_key(root, parent, key) else {
        let table = if parent.is_empty() { Some(root) } else { root.find(parent) };
        let keys = quoted(table?.fields().iter().map(|field| field.key));
        let owner = if parent.is_empty() { "the file".to_owned() } else { format!("`[{parent}]`") };
        return (!keys.is_empty()).then(|| format!("{owner} has the keys {keys}"));
    };
    let (meant_parent, meant_key) = meant.rsplit_once('.').unwrap_or(("", &meant));
    Some(if meant_parent == parent {
        format!("did you mean `{meant_key}`?")
    } else if meant_parent.is_empty() {
        format!("did you mean `{meant_key}`? it belongs at the top of the file, above all tables")
    } else {
        format!("did you mean `{meant_key}`? it belongs in `[{meant_parent}]`")
    })
}

fn type_hint(key: &str, item: &Item, shape: &Shape) -> Option<String> {
    let name = key.rsplit('.').next().unwrap_or(key);
    match (shape, &item.node) {
        (Shape::Integer { .. }, Node::Text(text)) if text.parse::<u64>().is_ok() => {
            Some(format!("leave out the quotes: `{name} = {text}`"))
        }
        (Shape::Number, Node::Text(text)) if text.parse::<f64>().is_ok() => {
            Some(format!("leave out the quotes: `{name} = {text}`"))
        }
        (Shape::Boolean, Node::Text(text)) if matches!(text.as_str(), "true" | "false") => {
            Some(format!("leave out the quotes: `{name} = {text}`"))
        }
        (Shape::Integer { .. }, Node::Float(value)) if value.fract() == 0.0 && value.abs() < 1e15 => {
            Some(format!("write it without a point: `{name} = {value:.0}`"))
        }
        (Shape::Table(table) | Shape::TextOrTables(table), _) => {
            let keys = quoted(table.fields.iter().map(|field| field.key));
            Some(format!("write it as a table, with the keys {keys}"))
        }
        (Shape::Text | Shape::Path, Node::Integer(_) | Node::Float(_) | Node::Boolean(_)) => {
            Some("put quotes around it".to_owned())
        }
        _ => None,
    }
}

fn found(node: &Node) -> String {
    match node {
        Node::Table(_) => "a table".to_owned(),
        Node::Array(_) => "a list".to_owned(),
        Node::Text(text) => {
            let shown: String = text.chars().take(40).collect();
            let more = if shown.len() < text.len() { "…" } else { "" };
            format!("the text `{}{more}`", shown.escape_debug())
        }
        Node::Integer(value) => format!("the number {value}"),
        Node::HugeInteger(digits) => format!("the number {digits}"),
        Node::Float(value) => format!("the number {value}"),
        Node::Boolean(value) => format!("`{value}`"),
        Node::Datetime(value) => format!("the date {value}"),
    }
}
