//! Reads what libtest prints and adds up its summaries. Doesn't run anything.

use std::ops::AddAssign;

/// How many test functions ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Functions that passed.
    pub passed: u64,
    /// Functions that failed.
    pub failed: u64,
    /// Functions that were ignored.
    pub skipped: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// The counts of a summary line: `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
pub fn summary(line: &str) -> Option<Counts> {
    let (_, fields) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = Counts::default();
    for field in fields.split("; ") {
        let Some((number, what)) = field.split_once(' ') else {
            continue;
        };
        let place = match what {
            "passed" => &mut counts.passed,
            "failed" => &mut counts.failed,
            "ignored" => &mut counts.skipped,
            _ => continue,
        };
        *place = number.parse().ok()?;
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_counted() {
        for (line, passed, failed, skipped) in [
            ("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s", 3, 0, 1),
            (
                "test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
                10,
                2,
                0,
            ),
        ] {
            assert_eq!(summary(line), Some(Counts { passed, failed, skipped }), "{line}");
        }
    }

    #[test]
    fn other_lines_are_not_counted() {
        for line in ["running 3 tests", "test a::b ... ok", "", "the test result: ok. 1 passed"] {
            assert_eq!(summary(line), None, "{line}");
        }
    }

    #[test]
    fn counts_add_up() {
        let mut sum = Counts { passed: 1, failed: 0, skipped: 2 };
        sum += Counts { passed: 4, failed: 1, skipped: 0 };
        assert_eq!(sum, Counts { passed: 5, failed: 1, skipped: 2 });
    }
}
