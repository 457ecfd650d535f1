//! Rows of cells in columns.

use ratatui::{
    style::Style,
    text::{Line, Span},
};

use super::Theme;

/// A cell and how it looks.
pub(super) type Cell = (String, Style);

/// A cell that looks as text does.
pub(super) fn plain(text: impl Into<String>) -> Cell {
    (text.into(), Style::new())
}

/// Columns as wide as their widest cell; where that is too wide together, the widest give way. The last column takes
/// what is left of `width`.
pub(super) fn table(header: &[&str], rows: Vec<Vec<Cell>>, width: u16, theme: Theme) -> Vec<Line<'static>> {
    let length = |cell: &Cell| cell.0.chars().count();
    let mut widths: Vec<usize> = header.iter().map(|title| title.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(length(cell));
        }
    }
    let last = widths.pop().unwrap_or_default();
    let room = usize::from(width).saturating_sub(2 * widths.len());
    // The last column keeps at least a third, if it has that much to say.
    let for_last = last.min(room / 3);
    while widths.iter().sum::<usize>() > room - for_last {
        let Some(widest) = widths.iter_mut().max() else { break };
        if *widest <= 4 {
            break;
        }
        *widest -= 1;
    }
    let rest = room.saturating_sub(widths.iter().sum());
    widths.push(rest);
    let titles = header.iter().map(|title| ((*title).to_owned(), theme.faint())).collect();
    std::iter::once(titles).chain(rows).map(|row| line(row, &widths, theme)).collect()
}

fn line(row: Vec<Cell>, widths: &[usize], theme: Theme) -> Line<'static> {
    let mut spans = Vec::new();
    for (place, ((text, style), width)) in row.into_iter().zip(widths).enumerate() {
        if place > 0 {
            spans.push(Span::raw("  "));
        }
        let text = cut(&theme.text(&text), *width, theme);
        let is_last = place + 1 == widths.len();
        spans.push(Span::styled(if is_last { text } else { format!("{text:<width$}") }, style));
    }
    Line::from(spans)
}

/// A text that fits.
pub(super) fn cut(text: &str, width: usize, theme: Theme) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(width.saturating_sub(1)).collect();
    if width > 0 {
        cut.push_str(theme.letter("…", "~"));
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEME: Theme = Theme { color: false, unicode: true };

    fn text(header: &[&str], rows: &[&[&str]], width: u16) -> Vec<String> {
        let rows = rows.iter().map(|row| row.iter().map(|cell| plain(*cell)).collect()).collect();
        table(header, rows, width, THEME).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn columns_line_up_and_the_last_takes_the_rest() {
        let lines = text(&["A", "B"], &[&["one", "a long reason"], &["two and", "b"]], 16);
        assert_eq!(lines, ["A        B", "one      a long…", "two and  b"]);
    }

    #[test]
    fn where_room_is_short_the_widest_column_gives_way() {
        let lines = text(&["WORKER", "STEP", "REASON"], &[&["0198f2aa-77cc-4d", "12", "it is away"]], 30);
        assert_eq!(lines[1], "0198f2aa-77cc…  12    it is a…");
        assert!(lines.iter().all(|line| line.chars().count() <= 30), "{lines:?}");
    }
}
