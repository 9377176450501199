//! When an endpoint is polled. Owns the time of the next poll; what else is read, and when, is for those who ask.

use std::time::{Duration, Instant};

/// The longest time between two polls of a source that fails.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// The pace of polls.
pub struct Pace {
    interval: Duration,
    pause: Duration,
    due: Instant,
    fails: bool,
}

impl Pace {
    /// The first poll is due now.
    pub fn new(interval: Duration) -> Self {
        Self { interval, pause: interval, due: Instant::now(), fails: false }
    }

    /// When the next poll is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// A read that began then took so long, and was a poll or not.
    ///
    /// From one beginning to the next, so that a change shows within the interval and the time of a read; but a slow
    /// endpoint has as long to itself as it took. Those who wait for less don't put the poll off.
    pub fn note(&mut self, began: Instant, took: Duration, is_poll: bool, is_ok: bool) {
        self.pause = if is_ok { self.interval } else { (self.pause * 2).min(LONGEST_PAUSE) };
        // What was put off while the source failed isn't any more.
        if is_poll || !is_ok || self.fails {
            self.due = began + self.pause.max(2 * took);
        }
        self.fails = !is_ok;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(1);
    const SHORT: Duration = Duration::from_millis(10);

    #[test]
    fn hurried_reads_put_no_poll_off() {
        let mut pace = Pace::new(INTERVAL);
        let began = pace.due();
        pace.note(began, SHORT, true, true);
        assert_eq!(pace.due(), began + INTERVAL);
        pace.note(began + INTERVAL / 2, SHORT, false, true);
        assert_eq!(pace.due(), began + INTERVAL);
        let slow = began + INTERVAL;
        pace.note(slow, INTERVAL, true, true);
        assert_eq!(pace.due(), slow + 2 * INTERVAL);
    }

    #[test]
    fn pauses_grow_until_any_read_succeeds() {
        let mut pace = Pace::new(INTERVAL);
        let began = pace.due();
        for pause in [2, 4, 8, 15, 15] {
            pace.note(began, SHORT, true, false);
            assert_eq!(pace.due(), began + Duration::from_secs(pause));
        }
        pace.note(began + INTERVAL, SHORT, false, true);
        assert_eq!(pace.due(), began + 2 * INTERVAL, "the outage is over");
        pace.note(began + INTERVAL + SHORT, SHORT, false, true);
        assert_eq!(pace.due(), began + 2 * INTERVAL);
    }
}
