//! Any bytes as the file of `--rules`: read or refused, and what is read is valid. The file system isn't here.

#[path = "inventory.rs"]
mod inventory;

use std::path::Path;

use sg_agent::source::{RulesFile, SourceError};

/// Panics where a file is read as it mustn't be.
pub fn check(text: &[u8]) {
    match RulesFile::parse(text, Path::new("rules.json")) {
        Ok(read) => {
            inventory::check(&read);
            let again = RulesFile::parse(text, Path::new("rules.json"));
            assert_eq!(again.ok(), Some(read), "the same file says two things");
        }
        // The place that users are sent to is in the file.
        Err(SourceError::Json { line, .. }) => {
            assert!(line <= 1 + text.iter().filter(|byte| **byte == b'\n').count(), "line {line} is past the end");
        }
        Err(SourceError::EmptyFile { .. }) => {}
        // What is listed twice has a name to be found by.
        Err(SourceError::Contradiction { what, .. }) => assert!(!what.ends_with(' '), "{what:?} names nothing"),
        Err(error) => panic!("an error of something else than the text: {error}"),
    }
}
