//! Metadata as it lies in the file.

/// A value of the metadata.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// A whole number of any width.
    Unsigned(u64),
    /// A whole number of any width that may be negative.
    Signed(i64),
    /// A number of 32 or 64 bits.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// Text; bytes that should be UTF-8.
    Text(&'a [u8]),
    /// Many values of one type.
    List(List<'a>),
}

impl<'a> Value<'a> {
    /// As a whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(number) => Some(number),
            Self::Signed(number) => u64::try_from(number).ok(),
            _ => None,
        }
    }

    /// As a whole number.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::Unsigned(number) => i64::try_from(number).ok(),
            Self::Signed(number) => Some(number),
            _ => None,
        }
    }

    /// As a number; whole ones too.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(number) => Some(number as f64),
            Self::Signed(number) => Some(number as f64),
            Self::Float(number) => Some(number),
            _ => None,
        }
    }

    /// As true or false.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(flag) => Some(flag),
            _ => None,
        }
    }

    /// As text, where it is UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Self::Text(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// As a list.
    pub fn as_list(&self) -> Option<List<'a>> {
        match *self {
            Self::List(list) => Some(list),
            _ => None,
        }
    }
}

/// Many values of one type, as bytes of the file that were checked to hold them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct List<'a> {
    pub(crate) item: Item,
    pub(crate) count: usize,
    pub(crate) bytes: &'a [u8],
}

impl<'a> List<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One after the other.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (item, mut rest) = (self.item, self.bytes);
        (0..self.count).map_while(move |_| {
            let (value, behind) = item.take(rest)?;
            rest = behind;
            Some(value)
        })
    }
}

/// The type of a value that is no list, by its number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Item {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    U64,
    I64,
    F64,
}

impl Item {
    /// The number that means a list.
    pub(crate) const LIST: u32 = 9;

    pub(crate) fn of(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Text,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of a value; of text, those of its length.
    pub(crate) fn width(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Text => 8,
        }
    }

    /// The value at the front of `bytes`, and what lies behind it; none where they are too few.
    pub(crate) fn take(self, bytes: &[u8]) -> Option<(Value<'_>, &[u8])> {
        let (front, behind) = bytes.split_at_checked(self.width())?;
        let mut wide = [0; 8];
        wide[..front.len()].copy_from_slice(front);
        let number = u64::from_le_bytes(wide);
        let value = match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Value::Unsigned(number),
            Self::I8 => Value::Signed(i64::from(number as u8 as i8)),
            Self::I16 => Value::Signed(i64::from(number as u16 as i16)),
            Self::I32 => Value::Signed(i64::from(number as u32 as i32)),
            Self::I64 => Value::Signed(number as i64),
            Self::F32 => Value::Float(f64::from(f32::from_bits(number as u32))),
            Self::F64 => Value::Float(f64::from_bits(number)),
            Self::Bool => Value::Bool(number != 0),
            Self::Text => {
                let (text, behind) = behind.split_at_checked(usize::try_from(number).ok()?)?;
                return Some((Value::Text(text), behind));
            }
        };
        Some((value, behind))
    }
}
