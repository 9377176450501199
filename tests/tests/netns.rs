//! The agent in network namespaces, with `--rules` and `--attach`: what real sockets get through. Each test makes its
//! own network and its own agent, so that they can run at the same time.

#[path = "netns/rules.rs"]
mod rules;

use tests::e2e::Attempt;

/// All of them must get through.
#[track_caller]
fn pass<'a>(attempts: impl IntoIterator<Item = Attempt<'a>>) {
    attempts.into_iter().for_each(|attempt| attempt.passes());
}

/// All of them must disappear without an answer.
#[track_caller]
fn vanish<'a>(attempts: impl IntoIterator<Item = Attempt<'a>>) {
    attempts.into_iter().for_each(|attempt| attempt.vanishes());
}
