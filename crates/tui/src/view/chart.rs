//! A curve with its axes: dots of braille, two by four in a letter; stars where there is ASCII alone.

use ratatui::{
    Frame,
    layout::Rect,
    text::{Line, Span},
};

use super::{Theme, say};

/// A curve.
pub(super) struct Chart<'a> {
    pub title: String,
    /// Places and values, by place.
    pub points: &'a [(f64, f64)],
    /// How a value is written.
    pub label: fn(f64) -> String,
}

/// Draws a chart over a whole area: title, plot, places.
pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, chart: &Chart<'_>, theme: Theme) {
    let points: Vec<(f64, f64)> =
        chart.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let mut lines = vec![Line::from(Span::styled(theme.text(&chart.title), theme.strong()))];
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        lines.push(Line::from(Span::styled("no steps yet", theme.faint())));
        return say(frame, area, lines);
    };
    let (low, high) = bounds(&points);
    let labels = [(chart.label)(high), (chart.label)(low)];
    let margin = labels.iter().map(|label| label.chars().count()).max().unwrap_or_default();
    let height = usize::from(area.height).saturating_sub(2).max(1);
    let width = usize::from(area.width).saturating_sub(margin + 2).max(1);
    let axis = theme.letter("│", "|");
    for (row, plotted) in plot(&points, (low, high), width, height, theme.unicode).into_iter().enumerate() {
        let label = match row {
            0 => labels[0].as_str(),
            _ if row + 1 == height => labels[1].as_str(),
            _ => "",
        };
        lines.push(Line::from(vec![
            Span::styled(format!("{label:>margin$}{axis}"), theme.faint()),
            Span::styled(plotted, theme.curve()),
        ]));
    }
    let (from, to) = (format!("{:.0}", first.0), format!("{:.0}", last.0));
    let gap = width.saturating_sub(from.len() + to.len());
    let places = format!("{:margin$} {from}{:gap$}{to}", "", "");
    lines.push(Line::from(Span::styled(places, theme.faint())));
    say(frame, area, lines);
}

/// The lowest and the highest value, never the same.
fn bounds(points: &[(f64, f64)]) -> (f64, f64) {
    let low = points.iter().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    if high > low { (low, high) } else { (low - 0.5, high + 0.5) }
}

/// Rows of letters, from the top. A column of dots shows the mean of the points that fall into it; neighbours are joined.
fn plot(
    points: &[(f64, f64)],
    (low, high): (f64, f64),
    width: usize,
    height: usize,
    braille: bool,
) -> Vec<String> {
    let (across, down) = if braille { (2, 4) } else { (1, 1) };
    let (columns, rows) = (width * across, height * down);
    let means = means(points, columns);
    let row_of = |value: f64| {
        let share = ((value - low) / (high - low)).clamp(0.0, 1.0);
        rows - 1 - (share * (rows - 1) as f64).round() as usize
    };
    let mut dots = vec![vec![false; columns]; rows];
    let mut before: Option<usize> = None;
    for (column, mean) in means.iter().enumerate() {
        let Some(mean) = mean else { continue };
        let row = row_of(*mean);
        let from = before.unwrap_or(row);
        // From beside the last dot to this one, so that a jump is a line.
        let span = match from.cmp(&row) {
            std::cmp::Ordering::Less => from + 1..=row,
            std::cmp::Ordering::Greater => row..=from - 1,
            std::cmp::Ordering::Equal => row..=row,
        };
        for dot in span {
            dots[dot][column] = true;
        }
        before = Some(row);
    }
    (0..height).map(|row| (0..width).map(|column| letter(&dots, row, column, braille)).collect()).collect()
}

fn letter(dots: &[Vec<bool>], row: usize, column: usize, braille: bool) -> char {
    if !braille {
        return if dots[row][column] { '*' } else { ' ' };
    }
    const BITS: [[u32; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
    let mut bits = 0;
    for (down, pair) in BITS.iter().enumerate() {
        for (right, bit) in pair.iter().enumerate() {
            if dots[row * 4 + down][column * 2 + right] {
                bits |= bit;
            }
        }
    }
    if bits == 0 { ' ' } else { char::from_u32(0x2800 + bits).unwrap_or(' ') }
}

/// The mean of what falls into each column; between two points far apart, what lies on the line between them.
fn means(points: &[(f64, f64)], columns: usize) -> Vec<Option<f64>> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return vec![None; columns] };
    let span = (last.0 - first.0).max(f64::MIN_POSITIVE);
    let place = |x: f64| (((x - first.0) / span) * (columns - 1) as f64).round() as usize;
    let mut sums = vec![(0.0, 0u32); columns];
    for (x, y) in points {
        let (sum, count) = &mut sums[place(*x).min(columns - 1)];
        *sum += y;
        *count += 1;
    }
    let mut means: Vec<Option<f64>> =
        sums.into_iter().map(|(sum, count)| (count > 0).then(|| sum / f64::from(count))).collect();
    let known: Vec<usize> = (0..columns).filter(|column| means[*column].is_some()).collect();
    for pair in known.windows(2) {
        let (Some(from), Some(to)) = (means[pair[0]], means[pair[1]]) else { continue };
        let gap = (pair[1] - pair[0]) as f64;
        for (steps, mean) in (1u32..).zip(&mut means[pair[0] + 1..pair[1]]) {
            *mean = Some(from + f64::from(steps) / gap * (to - from));
        }
    }
    means
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_falls_is_drawn_from_the_upper_left_to_the_lower_right() {
        let points: Vec<(f64, f64)> = (0..=4).map(|x| (f64::from(x), f64::from(4 - x))).collect();
        assert_eq!(plot(&points, (0.0, 4.0), 5, 5, false), ["*    ", " *   ", "  *  ", "   * ", "    *"]);
        assert_eq!(plot(&points, (0.0, 4.0), 2, 1, true), ["⠑⢄"]);
    }

    #[test]
    fn few_points_are_joined_and_many_are_averaged() {
        assert_eq!(means(&[(0.0, 0.0), (10.0, 4.0)], 5), [0.0, 1.0, 2.0, 3.0, 4.0].map(Some));
        let many: Vec<(f64, f64)> = (0..1000).map(|x| (f64::from(x), f64::from(x % 2))).collect();
        assert!(means(&many, 10).iter().all(|mean| mean.is_some_and(|mean| (mean - 0.5).abs() < 0.02)));
    }

    #[test]
    fn one_point_and_values_that_do_not_change_can_be_drawn() {
        assert_eq!(bounds(&[(3.0, 2.0)]), (1.5, 2.5));
        assert_eq!(plot(&[(3.0, 2.0)], (1.5, 2.5), 3, 1, false), ["*  "]);
    }
}
