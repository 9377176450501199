//! How the sets of tests ended: the table, the closing line, and what counts as failed.

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use console::style;

use crate::libtest::Counts;

/// How a set ended.
pub enum Outcome {
    /// All of it.
    Passed,
    /// What could be looked at passed; the rest, which this machine can't help, wasn't looked at.
    Partly(String),
    /// Something did not; the reason.
    Failed(String),
    /// What is missing.
    Skipped(String),
}

/// A line of the table.
pub struct Row {
    /// What was run.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Its test functions.
    pub counts: Counts,
    /// How long it took.
    pub time: Duration,
}

/// Nothing failed; what couldn't run has said so.
pub fn done(counts: &Counts) -> Outcome {
    match counts.skipped {
        0 => Outcome::Passed,
        skipped => Outcome::Partly(format!("{skipped} tests were NOT run; their lines name what they need")),
    }
}

/// In CI a set that was skipped has failed.
pub fn strict(outcome: Outcome) -> Outcome {
    let ci = env::var("CI").is_ok_and(|value| !["", "0", "false"].contains(&value.as_str()));
    match outcome {
        Outcome::Skipped(reason) if ci => Outcome::Failed(format!("can't run, and CI needs every set: {reason}")),
        other => other,
    }
}

/// Prints the table and the closing line. A set that failed or was skipped without a test function that did
/// (clippy, say) counts as one.
pub fn show(rows: &[Row]) -> ExitCode {
    println!();
    let mut sum = Counts::default();
    let mut code = ExitCode::SUCCESS;
    for row in rows {
        let (word, reason) = match &row.outcome {
            Outcome::Passed => (style("passed").green(), ""),
            Outcome::Partly(reason) => (style("partly").yellow(), reason.as_str()),
            Outcome::Failed(reason) => (style("failed").red(), reason.as_str()),
            Outcome::Skipped(reason) => (style("skipped").yellow(), reason.as_str()),
        };
        let counts = total(row);
        if counts.failed > 0 {
            code = ExitCode::FAILURE;
        }
        sum += counts;
        let reason = reason.lines().next().unwrap_or_default();
        let line = format!(
            "{:<11} {word:<8} {:>5} tests {:>7.1} s  {reason}",
            row.name,
            row.counts.passed + row.counts.failed,
            row.time.as_secs_f64()
        );
        println!("{}", line.trim_end());
    }
    println!("{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.skipped);
    code
}

fn total(row: &Row) -> Counts {
    let mut counts = row.counts;
    match row.outcome {
        Outcome::Failed(_) => counts.failed = counts.failed.max(1),
        Outcome::Skipped(_) => counts.skipped = counts.skipped.max(1),
        Outcome::Passed | Outcome::Partly(_) => {}
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(outcome: Outcome, counts: Counts) -> Row {
        Row { name: "unit".to_owned(), outcome, counts, time: Duration::ZERO }
    }

    #[test]
    fn a_failure_without_a_test_function_counts() {
        let none = Counts::default();
        assert_eq!(total(&row(Outcome::Passed, none)), none);
        assert_eq!(total(&row(Outcome::Failed("warnings".to_owned()), none)).failed, 1);
        assert_eq!(total(&row(Outcome::Skipped("no root".to_owned()), none)).skipped, 1);
        let two = Counts { passed: 5, failed: 2, skipped: 0 };
        assert_eq!(total(&row(Outcome::Failed("two of them".to_owned()), two)), two);
    }
}
