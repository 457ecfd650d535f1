//! Strided matrices inside a backend's memory.

use super::Backend;

/// A matrix that is read: `rows` rows of `columns` numbers, `stride` apart, from `offset` on.
pub struct View<'a, B: Backend> {
    /// The memory it lies in.
    pub data: &'a B::Buffer,
    /// Where its first number lies.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Numbers in a row.
    pub columns: usize,
    /// From the start of a row to the start of the next; at least `columns`.
    pub stride: usize,
}

impl<B: Backend> Clone for View<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for View<'_, B> {}

impl<'a, B: Backend> View<'a, B> {
    /// `rows` x `columns` numbers without gaps, from the front of `data`.
    pub fn new(data: &'a B::Buffer, rows: usize, columns: usize) -> Self {
        Self::at(data, 0, rows, columns)
    }

    /// `rows` x `columns` numbers without gaps, from `offset` on.
    pub fn at(data: &'a B::Buffer, offset: usize, rows: usize, columns: usize) -> Self {
        Self { data, offset, rows, columns, stride: columns }
    }

    /// Rows `first .. first + rows`.
    #[must_use]
    pub fn row_range(mut self, first: usize, rows: usize) -> Self {
        debug_assert!(first + rows <= self.rows, "rows {first}+{rows} of {}", self.rows);
        self.offset += first * self.stride;
        self.rows = rows;
        self
    }

    /// Columns `first .. first + columns`.
    #[must_use]
    pub fn column_range(mut self, first: usize, columns: usize) -> Self {
        debug_assert!(first + columns <= self.columns, "columns {first}+{columns} of {}", self.columns);
        self.offset += first;
        self.columns = columns;
        self
    }

    /// The same place in other memory, to be written: where the gradient of a parameter goes.
    pub fn of<'b>(&self, data: &'b mut B::Buffer) -> ViewMut<'b, B> {
        ViewMut { data, offset: self.offset, rows: self.rows, columns: self.columns, stride: self.stride }
    }
}

/// A matrix that is written.
pub struct ViewMut<'a, B: Backend> {
    /// The memory it lies in.
    pub data: &'a mut B::Buffer,
    /// Where its first number lies.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Numbers in a row.
    pub columns: usize,
    /// From the start of a row to the start of the next; at least `columns`.
    pub stride: usize,
}

impl<'a, B: Backend> ViewMut<'a, B> {
    /// `rows` x `columns` numbers without gaps, from the front of `data`.
    pub fn new(data: &'a mut B::Buffer, rows: usize, columns: usize) -> Self {
        Self::at(data, 0, rows, columns)
    }

    /// `rows` x `columns` numbers without gaps, from `offset` on.
    pub fn at(data: &'a mut B::Buffer, offset: usize, rows: usize, columns: usize) -> Self {
        Self { data, offset, rows, columns, stride: columns }
    }

    /// Columns `first .. first + columns`.
    #[must_use]
    pub fn column_range(mut self, first: usize, columns: usize) -> Self {
        debug_assert!(first + columns <= self.columns, "columns {first}+{columns} of {}", self.columns);
        self.offset += first;
        self.columns = columns;
        self
    }

    /// The same matrix for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, B> {
        ViewMut {
            data: &mut *self.data,
            offset: self.offset,
            rows: self.rows,
            columns: self.columns,
            stride: self.stride,
        }
    }

    /// The same matrix to read.
    pub fn view(&self) -> View<'_, B> {
        View {
            data: &*self.data,
            offset: self.offset,
            rows: self.rows,
            columns: self.columns,
            stride: self.stride,
        }
    }
}
