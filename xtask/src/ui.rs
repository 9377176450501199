//! What the user sees on standard error: steps, notes and progress. Results (tables, how-tos) go to standard output.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use console::style;
use indicatif::{ProgressBar, ProgressStyle};

/// Without a terminal, how often something long says that it is still at it.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Says what is about to be done, and why.
pub fn step(text: &str) {
    eprintln!("{} {text}", style("=>").for_stderr().cyan().bold());
}

/// Says something worth knowing that needs no action.
pub fn note(text: &str) {
    eprintln!("   {text}");
}

/// Says that something isn't as it should be, though work goes on.
pub fn warn(text: &str) {
    eprintln!("{} {text}", style("warning:").for_stderr().yellow().bold());
}

/// Says why the command failed.
pub fn error(text: &str) {
    eprintln!("{} {text}", style("error:").for_stderr().red().bold());
}

/// A spinner on a terminal, plain lines elsewhere; it ends when dropped.
pub struct Progress {
    label: String,
    started: Instant,
    heartbeat: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts showing `label` with the time that has passed.
    pub fn start(label: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(label.to_owned());
            if let Ok(template) = ProgressStyle::with_template("{spinner:.cyan} {msg} [{elapsed}]") {
                bar.set_style(template);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let now = Instant::now();
        Self { label: label.to_owned(), started: now, heartbeat: now, bar }
    }

    /// To be called now and then: tells a log file that the work goes on.
    pub fn tick(&mut self) {
        if self.bar.is_none() && self.heartbeat.elapsed() >= HEARTBEAT {
            self.heartbeat = Instant::now();
            note(&format!("{}: {} s so far", self.label, self.started.elapsed().as_secs()));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let elapsed = self.started.elapsed();
        if elapsed >= Duration::from_secs(1) {
            note(&format!("{}: {:.1} s", self.label, elapsed.as_secs_f64()));
        }
    }
}
