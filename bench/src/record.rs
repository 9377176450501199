//! What was measured, one JSON object a line on standard output, for `cargo xtask bench` to read; and words for people
//! on standard error. Keeps nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Which way a ratio has to stay.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Bound {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

/// A line of standard output.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line<'a> {
    Sample {
        section: &'a str,
        figure: &'a str,
        variant: &'a str,
        unit: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        axis: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        at: Option<f64>,
        values: &'a [f64],
    },
    Target {
        section: &'a str,
        what: &'a str,
        values: &'a [f64],
        bound: f64,
        at_most: bool,
    },
    Note {
        section: &'a str,
        text: &'a str,
    },
}

/// Writes down what one section measures.
#[derive(Clone, Debug)]
pub struct Recorder {
    section: &'static str,
    interrupted: Arc<AtomicBool>,
    /// Whether it is to be done within seconds.
    pub quick: bool,
}

impl Recorder {
    /// A recorder that notices signals; a second one ends the program at once.
    ///
    /// # Errors
    /// Those of installing handlers.
    pub fn new(quick: bool) -> Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&interrupted))?;
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        Ok(Self { section: "", interrupted, quick })
    }

    /// The same for another section.
    pub fn section(&self, section: &'static str) -> Self {
        Self { section, ..self.clone() }
    }

    /// To be called between two measurements.
    ///
    /// # Errors
    /// Where somebody has asked the program to end.
    pub fn check(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// As many rounds as there is time for.
    pub fn rounds(&self, full: usize) -> usize {
        if self.quick { full.div_ceil(8).max(3) } else { full }
    }

    /// Values of one figure, one a round.
    pub fn sample(&self, figure: &str, variant: &str, unit: &str, values: &[f64]) {
        self.write(figure, variant, unit, None, values);
    }

    /// The same as a point of a curve: at this value of an axis (`rules`, `prefixes`, `instances`, `flows`).
    pub fn point(&self, figure: &str, variant: &str, unit: &str, (axis, at): (&str, f64), values: &[f64]) {
        self.write(figure, variant, unit, Some((axis, at)), values);
    }

    fn write(&self, figure: &str, variant: &str, unit: &str, point: Option<(&str, f64)>, values: &[f64]) {
        let (axis, at) = point.unzip();
        let place = point.map(|(axis, at)| format!(" at {at} {axis}")).unwrap_or_default();
        eprintln!("   {}: {figure}, {variant}{place}: {:.4} {unit}", self.section, median(values));
        self.put(&Line::Sample { section: self.section, figure, variant, unit, axis, at, values });
    }

    /// What was aimed at: one value a round, mostly a ratio, and where it has to stay.
    pub fn target(&self, what: &str, values: &[f64], bound: Bound) {
        let (bound, at_most) = match bound {
            Bound::AtMost(bound) => (bound, true),
            Bound::AtLeast(bound) => (bound, false),
        };
        self.put(&Line::Target { section: self.section, what, values, bound, at_most });
    }

    /// Something that the report's reader must know.
    pub fn note(&self, text: &str) {
        eprintln!("   {}: {text}", self.section);
        self.put(&Line::Note { section: self.section, text });
    }

    fn put(&self, line: &Line) {
        match serde_json::to_string(line) {
            Ok(text) => println!("{text}"),
            Err(error) => eprintln!("error: a figure can't be written as JSON: {error}"),
        }
    }
}

/// The middle value; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[length / 2],
        length => (sorted[length / 2 - 1] + sorted[length / 2]) / 2.0,
    }
}

/// One by the other, round by round: what drifts in both cancels.
pub fn ratios(of: &[f64], by: &[f64]) -> Vec<f64> {
    of.iter().zip(by).map(|(of, by)| of / by).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_found() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn rounds_are_compared_one_by_one() {
        assert_eq!(ratios(&[2.0, 30.0], &[1.0, 10.0]), [2.0, 3.0]);
    }
}
