//! What the fuzzers start from and what they found (`fuzz/corpus-seeds`, `fuzz/regressions`), replayed without a
//! fuzzer through the same checks.

#![expect(
    clippy::duplicate_mod,
    reason = "two checks share a part, and each target includes its own check as a module"
)]

#[path = "../../fuzz/checks/packet.rs"]
mod packet;
#[path = "../../fuzz/checks/rules_file.rs"]
mod rules_file;
#[path = "../../fuzz/checks/xml.rs"]
mod xml;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Replays a target's files, and says how many there were. Every one that fails is named.
fn replay(target: &str, check: fn(&[u8])) -> usize {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let mut failed = Vec::new();
    let mut count = 0;
    for folder in ["corpus-seeds", "regressions"] {
        let folder = fuzz.join(folder).join(target);
        // A target without regressions has no folder for them.
        let Ok(files) = folder.read_dir() else { continue };
        for file in files {
            let path = file.expect("a folder that can be read").path();
            let bytes = fs::read(&path).expect("a file that can be read");
            count += 1;
            if catch_unwind(AssertUnwindSafe(|| check(&bytes))).is_err() {
                failed.push(path);
            }
        }
    }
    assert!(failed.is_empty(), "what fails, its reason above: {failed:#?}");
    count
}

#[test]
fn answers_of_the_api() {
    assert!(replay("xml", xml::check) >= 60);
}

#[test]
fn rules_files() {
    assert!(replay("rules_file", rules_file::check) >= 3);
}

#[test]
fn frames() {
    assert!(replay("packet", packet::check) >= 20);
}
