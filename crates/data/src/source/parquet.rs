//! Parquet: string columns, and lists of structs for `messages`.

use std::path::{Path, PathBuf};

use arrow::{
    array::{Array, AsArray, RecordBatch},
    datatypes::{
        DataType, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
        UInt32Type, UInt64Type,
    },
};
use parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    errors::ParquetError,
};
use serde_json::{Map, Value};

use super::{
    Raw,
    input::{Chunks, network_error, network_error_of_arrow},
};
use crate::{Error, Place};

const BATCH_RECORDS: usize = 1024;

/// Reads a file in batches of rows.
pub(super) struct Reader {
    path: PathBuf,
    rows: ParquetRecordBatchReader,
    rows_done: u64,
    rows_total: u64,
    size: u64,
}

fn builder(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<Chunks>, Error> {
    ParquetRecordBatchReaderBuilder::try_new(Chunks::open(path)?).map_err(|source| fail(path, source))
}

fn fail(path: &Path, source: ParquetError) -> Error {
    match network_error(source) {
        Ok(error) => error.into(),
        Err(source) => Error::Parquet { path: path.to_owned(), reason: source.to_string() },
    }
}

/// Names of a file's columns.
pub(super) fn columns(path: &Path) -> Result<Vec<String>, Error> {
    let builder = builder(path)?;
    if builder.metadata().file_metadata().num_rows() == 0 {
        return Err(Error::EmptyFile { path: path.to_owned() });
    }
    Ok(builder.schema().fields().iter().map(|field| field.name().clone()).collect())
}

impl Reader {
    /// Opens a file; only `wanted` columns are decoded (all, if that is empty).
    pub(super) fn open(path: &Path, wanted: &[&str]) -> Result<Self, Error> {
        let builder = builder(path)?;
        let rows_total = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        let roots: Vec<usize> = builder
            .schema()
            .fields()
            .iter()
            .enumerate()
            .filter(|(_, field)| wanted.is_empty() || wanted.contains(&field.name().as_str()))
            .map(|(index, _)| index)
            .collect();
        let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
        let rows = builder
            .with_projection(mask)
            .with_batch_size(BATCH_RECORDS)
            .build()
            .map_err(|source| fail(path, source))?;
        Ok(Self { path: path.to_owned(), rows, rows_done: 0, rows_total, size: super::size(path)? })
    }

    /// The bytes behind the reader, by the share of rows.
    pub(super) fn bytes_done(&self) -> u64 {
        let done = u128::from(self.size) * u128::from(self.rows_done);
        u64::try_from(done / u128::from(self.rows_total.max(1))).unwrap_or(self.size)
    }

    pub(super) fn next_records(&mut self) -> Result<Vec<(u64, Raw)>, Error> {
        let Some(batch) = self.rows.next() else { return Ok(Vec::new()) };
        let batch = batch.map_err(|source| match network_error_of_arrow(source) {
            Ok(error) => error.into(),
            Err(source) => Error::Parquet { path: self.path.clone(), reason: source.to_string() },
        })?;
        let mut records = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            self.rows_done += 1;
            let place = || Place { file: self.path.clone(), line: self.rows_done };
            records.push((self.rows_done, Raw::Object(object(&batch, row, &place)?)));
        }
        Ok(records)
    }
}

fn object(batch: &RecordBatch, row: usize, place: &impl Fn() -> Place) -> Result<Map<String, Value>, Error> {
    let mut map = Map::new();
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        let name = field.name();
        map.insert(name.clone(), value(column, row, name, place)?);
    }
    Ok(map)
}

/// One value of a column as JSON.
fn value(array: &dyn Array, row: usize, column: &str, place: &impl Fn() -> Place) -> Result<Value, Error> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    macro_rules! number {
        ($kind:ty) => {
            Value::from(array.as_primitive::<$kind>().value(row))
        };
    }
    let list = |items: &dyn Array| {
        (0..items.len()).map(|item| value(items, item, column, place)).collect::<Result<Vec<_>, _>>()
    };
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Utf8 => Value::from(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Value::from(array.as_string::<i64>().value(row)),
        DataType::Utf8View => Value::from(array.as_string_view().value(row)),
        DataType::Boolean => Value::from(array.as_boolean().value(row)),
        DataType::Int8 => number!(Int8Type),
        DataType::Int16 => number!(Int16Type),
        DataType::Int32 => number!(Int32Type),
        DataType::Int64 => number!(Int64Type),
        DataType::UInt8 => number!(UInt8Type),
        DataType::UInt16 => number!(UInt16Type),
        DataType::UInt32 => number!(UInt32Type),
        DataType::UInt64 => number!(UInt64Type),
        DataType::Float32 => number!(Float32Type),
        DataType::Float64 => number!(Float64Type),
        DataType::List(_) => Value::Array(list(&array.as_list::<i32>().value(row))?),
        DataType::LargeList(_) => Value::Array(list(&array.as_list::<i64>().value(row))?),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            let mut map = Map::new();
            for (field, inner) in fields.iter().zip(columns) {
                let path = format!("{column}.{}", field.name());
                map.insert(field.name().clone(), value(inner, row, &path, place)?);
            }
            Value::Object(map)
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = dictionary.normalized_keys()[row];
            value(dictionary.values(), key, column, place)?
        }
        other => {
            return Err(Error::WrongType {
                place: place(),
                column: format!("`{column}`"),
                expected: "a string, number, boolean, list or struct",
                found: format!("of type {other}"),
            });
        }
    })
}
