//! `cargo xtask demo`: plays a user's session with the real AWS CLI, Docker and SSH, and checks each outcome.
//! This module owns the play; the stage (Moto, agent, containers) and its clearing away are `stage`'s.

mod stage;

use std::process::ExitCode;

use anyhow::Result;
use console::style;

use crate::build;
use stage::{Instance, Stage};

/// An outcome that the play expects.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    Allowed,
    Denied,
}

/// What came of an attempt to connect.
enum Attempt {
    /// It worked, and this came back.
    Answered(String),
    /// It was refused, cut or timed out.
    Denied(String),
    /// It failed in a way that is neither: the connection itself was let through.
    Broken(String),
}

/// Plays the session; fails when an outcome isn't what a security group promises.
pub fn run() -> Result<ExitCode> {
    let agent = build::build(true)?;
    let mut stage = Stage::set_up(agent)?;
    let differing = play(&mut stage)?;
    drop(stage);
    if differing == 0 {
        println!("\nall outcomes are as expected");
        Ok(ExitCode::SUCCESS)
    } else {
        println!("\noutcomes that differ from what is expected: {differing}");
        Ok(ExitCode::FAILURE)
    }
}

fn play(stage: &mut Stage) -> Result<u32> {
    let anywhere = ["--protocol", "tcp", "--port", "22", "--cidr", "0.0.0.0/0"];
    let private = ["--protocol", "tcp", "--port", "22", "--cidr", "10.0.0.0/8"];
    let mut differing = 0;
    let mut check = |what: &str, expected: Expected, attempt: Attempt| differing += judge(what, expected, attempt);

    chapter("A key, a group that lets SSH in from anywhere, and an instance, which becomes a container");
    stage.start_agent()?;
    stage.create_key()?;
    let web_group = stage.create_group("web")?;
    stage.authorize(&web_group, &anywhere)?;
    let web = stage.instance(&web_group, None)?;
    stage.serves(&web, 22)?;
    stage.ports()?;
    check("ssh gets a shell", Expected::Allowed, stage.ssh()?);

    chapter("The rule is revoked, and comes back");
    stage.revoke(&web_group, &anywhere)?;
    check("ssh is refused or times out", Expected::Denied, stage.ssh()?);
    stage.authorize(&web_group, &anywhere)?;
    check("ssh gets a shell again", Expected::Allowed, stage.ssh()?);

    chapter("Only 10.0.0.0/8 may: localhost isn't in it");
    stage.revoke(&web_group, &anywhere)?;
    stage.authorize(&web_group, &private)?;
    check("ssh from 127.0.0.1 is refused or times out", Expected::Denied, stage.ssh()?);

    chapter("Port 3306 of the database is for the group `app` alone");
    let app_group = stage.create_group("app")?;
    let db_group = stage.create_group("db")?;
    stage.authorize(&db_group, &["--protocol", "tcp", "--port", "3306", "--source-group", &app_group])?;
    let app = stage.instance(&app_group, None)?;
    let db = stage.instance(&db_group, Some("#!/bin/sh\nnc -ll -p 3306 -e /bin/echo hello from the database"))?;
    stage.serves(&db, 3306)?;
    let mut from = |instance: &Instance, expected, what: &str| -> Result<()> {
        let attempt = stage.connect(instance, &db, 3306)?;
        check(what, expected, attempt);
        Ok(())
    };
    from(&app, Expected::Allowed, "the instance in `app` reaches the database")?;
    from(&web, Expected::Denied, "the instance in `web` doesn't")?;

    chapter("Terminated instances take their containers with them");
    stage.terminate(&[&web, &app, &db])?;
    stage.settle()?;
    Ok(differing)
}

fn chapter(title: &str) {
    println!("\n{}", style(title).bold());
}

/// Prints the outcome; 1 if it differs from what is expected.
fn judge(what: &str, expected: Expected, attempt: Attempt) -> u32 {
    let (as_expected, came) = match attempt {
        Attempt::Answered(text) => (expected == Expected::Allowed, format!("answered: {text}")),
        Attempt::Denied(text) => (expected == Expected::Denied, text),
        Attempt::Broken(text) => (false, format!("let through, then failed: {text}")),
    };
    let came = came.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    if as_expected {
        println!("{} {what} ({came})", style("✓").green());
        0
    } else {
        println!("{} {what}: not so ({came})", style("✗").red());
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_outcome_passes() {
        let answered = || Attempt::Answered("hello".to_owned());
        let denied = || Attempt::Denied("timed out".to_owned());
        let broken = || Attempt::Broken("permission denied".to_owned());
        for (expected, attempt, differing) in [
            (Expected::Allowed, answered(), 0),
            (Expected::Allowed, denied(), 1),
            (Expected::Allowed, broken(), 1),
            (Expected::Denied, answered(), 1),
            (Expected::Denied, denied(), 0),
            (Expected::Denied, broken(), 1),
        ] {
            assert_eq!(judge("an attempt", expected, attempt), differing);
        }
    }
}
