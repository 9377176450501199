//! Rules that are read anew before somebody is judged: whom the proxy waits for, and what holds without an answer.

use std::time::Duration;

use sg_agent::proxy::{Ask, Freshness};
use tokio::sync::{mpsc, watch};

use crate::support::{Rules, Scene, connect, is_reset, talk, within};
use crate::{SOME, some};

/// Nobody waits so long in vain.
const HOUR: Duration = Duration::from_secs(3_600);
/// Everybody does.
const MOMENT: Duration = Duration::from_millis(100);

/// The next one who asks.
async fn next(asked: &mut mpsc::Receiver<Ask>) -> Ask {
    within(asked.recv()).await.expect("it was asked")
}

#[tokio::test]
async fn fresh_rules_are_asked_for_at_each_connection() {
    let (asks, mut asked) = mpsc::channel(4);
    let always = Freshness::always(asks).patience(HOUR);
    let scene = Scene::with(some(), 0, |proxy| proxy.fresh(always)).await;
    // The endpoint can't be read: the rules in force would let it in, and don't count.
    let client = tokio::spawn(is_reset(SOME, scene.at));
    next(&mut asked).await.send(Err("it is out".into())).unwrap();
    assert!(client.await.unwrap());
    scene.enforce(&Rules::default());
    // The answer brings the rule that lets it in.
    let client = tokio::spawn(connect(SOME, scene.at));
    let ask = next(&mut asked).await;
    assert!(!scene.is_knocked_at());
    scene.enforce(&some());
    ask.send(Ok(())).unwrap();
    let server = within(scene.server.accept()).await.unwrap().0;
    talk(&mut (client.await.unwrap().unwrap(), server)).await;
    // And the one that doesn't.
    let client = tokio::spawn(is_reset(SOME, scene.at));
    let ask = next(&mut asked).await;
    scene.enforce(&Rules::default());
    ask.send(Ok(())).unwrap();
    assert!(client.await.unwrap());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (1, 2));
}

#[tokio::test]
async fn without_an_answer_about_fresh_rules_nobody_gets_in() {
    let (asks, mut asked) = mpsc::channel(4);
    let always = Freshness::always(asks).patience(MOMENT);
    let scene = Scene::with(some(), 0, |proxy| proxy.fresh(always)).await;
    assert!(is_reset(SOME, scene.at).await);
    assert!(next(&mut asked).await.is_closed());
    assert!(!scene.is_knocked_at());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (0, 1));
}

#[tokio::test]
async fn stale_rules_are_read_anew_and_stand_if_they_can_not_be() {
    let stale = watch::Sender::new(false);
    let (asks, mut asked) = mpsc::channel(4);
    let while_stale = Freshness::while_stale(stale.subscribe(), asks, HOUR);
    let scene = Scene::with(some(), 0, |proxy| proxy.fresh(while_stale)).await;
    talk(&mut scene.connected(SOME).await).await;
    assert!(asked.try_recv().is_err(), "the rules are fresh");
    stale.send_replace(true);
    // The endpoint can't be read.
    let client = tokio::spawn(connect(SOME, scene.at));
    next(&mut asked).await.send(Err("it is out".into())).unwrap();
    let server = within(scene.server.accept()).await.unwrap().0;
    talk(&mut (client.await.unwrap().unwrap(), server)).await;
    // What is read then decides.
    let client = tokio::spawn(is_reset(SOME, scene.at));
    let ask = next(&mut asked).await;
    scene.enforce(&Rules::default());
    ask.send(Ok(())).unwrap();
    assert!(client.await.unwrap());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (2, 1));
}

#[tokio::test]
async fn stale_rules_stand_if_nobody_answers() {
    let stale = watch::Sender::new(true);
    let (asks, mut asked) = mpsc::channel(4);
    let while_stale = Freshness::while_stale(stale.subscribe(), asks, MOMENT);
    let scene = Scene::with(some(), 0, |proxy| proxy.fresh(while_stale)).await;
    talk(&mut scene.connected(SOME).await).await;
    assert!(next(&mut asked).await.is_closed());
    assert_eq!((scene.counters().accepted, scene.counters().refused), (1, 0));
}
