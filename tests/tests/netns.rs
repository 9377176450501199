//! The agent in network namespaces, with `--rules` and `--attach`: what real sockets get through. Each test makes its
//! own network and its own agent, so that they can run at the same time.

#[path = "netns/bad_input.rs"]
mod bad_input;
#[path = "netns/bridges.rs"]
mod bridges;
#[path = "netns/early.rs"]
mod early;
#[path = "netns/flows.rs"]
mod flows;
#[path = "netns/groups.rs"]
mod groups;
#[path = "netns/links.rs"]
mod links;
#[path = "netns/load.rs"]
mod load;
#[path = "netns/observe.rs"]
mod observe;
#[path = "netns/privileges.rs"]
mod privileges;
#[path = "netns/proxy.rs"]
mod proxy;
#[path = "netns/restart.rs"]
mod restart;
#[path = "netns/rules.rs"]
mod rules;
#[path = "netns/spoofing.rs"]
mod spoofing;
#[path = "netns/tampering.rs"]
mod tampering;
#[path = "netns/unit.rs"]
mod unit;
#[path = "netns/upgrade.rs"]
mod upgrade;

use std::panic::resume_unwind;
use std::thread;

use tests::e2e::Attempt;

/// All of them must get through.
fn pass<'a>(attempts: impl IntoIterator<Item = Attempt<'a>>) {
    try_all(attempts.into_iter().map(|attempt| (attempt, true)));
}

/// All of them must disappear without an answer.
fn vanish<'a>(attempts: impl IntoIterator<Item = Attempt<'a>>) {
    try_all(attempts.into_iter().map(|attempt| (attempt, false)));
}

/// Makes all the attempts at the same time.
fn try_all<'a>(attempts: impl IntoIterator<Item = (Attempt<'a>, bool)>) {
    thread::scope(|scope| {
        let tries: Vec<_> =
            attempts.into_iter().map(|(attempt, allowed)| scope.spawn(move || attempt.passes_if(allowed))).collect();
        for one in tries {
            one.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
}
