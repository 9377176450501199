//! Those who wait until what is desired is enforced (`sg-agent status --wait`).

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Reply;

/// The waiting.
#[derive(Default)]
pub struct Desk {
    waiting: Vec<Waiting>,
    last_problems: Vec<String>,
}

struct Waiting {
    asked: Instant,
    until: Instant,
    reply: oneshot::Sender<Reply>,
}

impl Desk {
    /// Somebody waits for a state that was read after `asked`.
    pub fn wait(&mut self, asked: Instant, patience: Duration, reply: oneshot::Sender<Reply>) {
        self.waiting.push(Waiting { asked, until: asked + patience, reply });
    }

    /// Everything was read at `since` or later, if it was read; what stands in the way of enforcing it are `problems`.
    pub fn serve(&mut self, since: Option<Instant>, problems: Vec<String>) {
        self.last_problems = problems;
        let Some(since) = since.filter(|_| self.last_problems.is_empty()) else { return };
        for waiting in self.waiting.extract_if(.., |waiting| waiting.asked <= since) {
            // Who has hung up needs no answer.
            let _ = waiting.reply.send(Reply::Synced);
        }
    }

    /// Ends when somebody has waited long enough.
    pub async fn next_deadline(&self) {
        match self.waiting.iter().map(|waiting| waiting.until).min() {
            Some(until) => tokio::time::sleep_until(until.into()).await,
            None => std::future::pending().await,
        }
    }

    /// Tells those who have waited long enough what is in the way.
    pub fn expire(&mut self) {
        let now = Instant::now();
        let problems = if self.last_problems.is_empty() {
            "no source has answered since; 'sg-agent status' has the last error".to_owned()
        } else {
            self.last_problems.join("; ")
        };
        for waiting in self.waiting.extract_if(.., |waiting| waiting.until <= now) {
            let _ = waiting.reply.send(Reply::Error(format!("what is desired is not enforced: {problems}")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_read_afterwards_counts() {
        let mut desk = Desk::default();
        let (tell, mut told) = oneshot::channel();
        let before = Instant::now();
        let asked = before + Duration::from_millis(1);
        desk.wait(asked, Duration::from_secs(60), tell);
        desk.serve(Some(before), Vec::new());
        assert!(told.try_recv().is_err());
        desk.serve(Some(asked), vec!["not attached".into()]);
        assert!(told.try_recv().is_err());
        desk.serve(None, Vec::new());
        assert!(told.try_recv().is_err());
        desk.serve(Some(asked), Vec::new());
        assert!(matches!(told.try_recv(), Ok(Reply::Synced)));
    }

    #[test]
    fn patience_ends_with_the_reason() {
        let mut desk = Desk::default();
        let (tell, mut told) = oneshot::channel();
        let asked = Instant::now();
        desk.wait(asked, Duration::ZERO, tell);
        desk.serve(Some(asked), vec!["link veth0 is not enforced".into()]);
        desk.expire();
        assert!(matches!(told.try_recv(), Ok(Reply::Error(text)) if text.contains("veth0")));
    }
}
