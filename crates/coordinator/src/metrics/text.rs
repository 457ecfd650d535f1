//! Prometheus' text format.

use std::{collections::BTreeMap, fmt::Write};

use super::table::{Kind, METRICS, Metric};

/// Values of a metric's labels, in the order of their names.
pub(super) type Labels = Vec<String>;

/// How many values were at most so large.
#[derive(Debug, Clone, Default)]
pub(super) struct Histogram {
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// Takes a value.
    pub fn observe(&mut self, bounds: &[f64], value: f64) {
        self.counts.resize(bounds.len() + 1, 0);
        let place = bounds.iter().position(|bound| value <= *bound).unwrap_or(bounds.len());
        self.counts[place] += 1;
        self.sum += value;
    }
}

#[derive(Debug)]
enum Sample {
    Value(f64),
    Histogram(Histogram),
}

/// A page of samples.
#[derive(Debug, Default)]
pub(super) struct Page {
    samples: BTreeMap<&'static str, BTreeMap<Labels, Sample>>,
}

impl Page {
    /// Sets a value.
    pub fn set(&mut self, metric: &Metric, labels: &[&str], value: f64) {
        debug_assert!(!matches!(metric.kind, Kind::Histogram(_)), "{} is a histogram", metric.name);
        self.put(metric, labels, Sample::Value(value));
    }

    /// Sets a value if there is one.
    pub fn set_some(&mut self, metric: &Metric, labels: &[&str], value: Option<f64>) {
        if let Some(value) = value {
            self.set(metric, labels, value);
        }
    }

    /// Sets a histogram.
    pub fn set_histogram(&mut self, metric: &Metric, labels: &[&str], histogram: Histogram) {
        self.put(metric, labels, Sample::Histogram(histogram));
    }

    fn put(&mut self, metric: &Metric, labels: &[&str], sample: Sample) {
        debug_assert_eq!(metric.labels.len(), labels.len(), "labels of {}", metric.name);
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.samples.entry(metric.name).or_default().insert(labels, sample);
    }

    /// The page as text, in the order of the table.
    pub fn render(&self) -> String {
        let mut out = String::new();
        for metric in METRICS {
            let Some(samples) = self.samples.get(metric.name) else { continue };
            let _ = writeln!(out, "# HELP {} {}", metric.name, metric.help);
            let _ = writeln!(out, "# TYPE {} {}", metric.name, metric.kind.as_str());
            for (labels, sample) in samples {
                match (sample, metric.kind) {
                    (Sample::Value(value), _) => line(&mut out, metric, "", labels, None, *value),
                    (Sample::Histogram(histogram), Kind::Histogram(bounds)) => {
                        buckets(&mut out, metric, labels, histogram, bounds);
                    }
                    (Sample::Histogram(_), _) => {}
                }
            }
        }
        out
    }
}

fn buckets(out: &mut String, metric: &Metric, labels: &Labels, histogram: &Histogram, bounds: &[f64]) {
    let mut sum = 0;
    let names = bounds.iter().map(f64::to_string).chain(std::iter::once("+Inf".to_owned()));
    for (bound, count) in names.zip(&histogram.counts) {
        sum += count;
        line(out, metric, "_bucket", labels, Some(&bound), sum as f64);
    }
    line(out, metric, "_sum", labels, None, histogram.sum);
    line(out, metric, "_count", labels, None, sum as f64);
}

fn line(out: &mut String, metric: &Metric, suffix: &str, labels: &Labels, bound: Option<&str>, value: f64) {
    let mut pairs: Vec<String> = metric
        .labels
        .iter()
        .zip(labels)
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    pairs.extend(bound.map(|bound| format!("le=\"{bound}\"")));
    let pairs = if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
    let _ = writeln!(out, "{}{suffix}{pairs} {value}", metric.name);
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::{
        super::table::{JOBS, STALL},
        *,
    };

    #[test]
    fn values_and_histograms_are_written_as_prometheus_reads_them() {
        let mut page = Page::default();
        page.set(&JOBS, &["a\"b\\c\n"], 3.0);
        let Kind::Histogram(bounds) = STALL.kind else { panic!("it is a histogram") };
        let mut histogram = Histogram::default();
        for value in [0.04, 0.04, 0.2, 1000.0] {
            histogram.observe(bounds, value);
        }
        page.set_histogram(&STALL, &["lost"], histogram);
        let text = page.render();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "# TYPE shanty_jobs gauge");
        assert_eq!(lines[2], r#"shanty_jobs{state="a\"b\\c\n"} 3"#);
        assert!(
            text.contains("shanty_recovery_stall_seconds_bucket{cause=\"lost\",le=\"0.01\"} 0\n"),
            "{text}"
        );
        assert!(
            text.contains("shanty_recovery_stall_seconds_bucket{cause=\"lost\",le=\"0.05\"} 2\n"),
            "{text}"
        );
        assert!(
            text.contains("shanty_recovery_stall_seconds_bucket{cause=\"lost\",le=\"300\"} 3\n"),
            "{text}"
        );
        assert!(
            text.contains("shanty_recovery_stall_seconds_bucket{cause=\"lost\",le=\"+Inf\"} 4\n"),
            "{text}"
        );
        assert!(text.contains("shanty_recovery_stall_seconds_count{cause=\"lost\"} 4\n"), "{text}");
        assert!(text.contains("shanty_recovery_stall_seconds_sum{cause=\"lost\"} 1000.28"), "{text}");
    }
}
