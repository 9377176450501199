//! Any bytes as the answer to every call: read or refused, and what is read is valid. The calls over the network are
//! not here.

#[path = "inventory.rs"]
mod inventory;

use sg_agent::source::{AnswerError, actions, parse_answer};

/// HTTP's statuses that decide anything: a good one and a bad one.
const STATUSES: [u16; 2] = [200, 400];

/// Panics where an answer is read as it mustn't be.
pub fn check(body: &[u8]) {
    let mut answered = 0;
    for action in actions() {
        for status in STATUSES {
            let read = parse_answer(action, status, body).expect("an action of the list");
            if let Ok(inventory) = &read {
                assert_eq!(status, 200, "{action}: a failed call has no answer");
                inventory::check(inventory);
                cut_off(action, body, &read);
                answered += 1;
            }
        }
    }
    assert!(answered <= 1, "one answer was read as that of {answered} calls");
}

/// A beginning of an answer is none, or says all that the whole says (a comment may follow it).
fn cut_off(action: &str, body: &[u8], whole: &Result<sg_agent::model::Inventory, AnswerError>) {
    for part in 1..8 {
        let cut = &body[..body.len() * part / 8];
        let read = parse_answer(action, 200, cut).expect("an action of the list");
        assert!(read.is_err() || read == *whole, "{action}: {} bytes of {} say something else", cut.len(), body.len());
    }
}
