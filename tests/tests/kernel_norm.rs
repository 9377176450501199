//! Every statement of the norm that the data path, the proxy and `explain` hold to is cited by a test.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The norm's sections that are about packets, verdicts and reasons.
const SECTIONS: [&str; 6] = ["1.", "2.", "3.", "4.", "5.", "7."];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The numbers of the norm's statements, as `- **3.2 D** ...`.
fn statements() -> BTreeSet<String> {
    let norm = fs::read_to_string(root().join("docs/semantics.md")).expect("the norm");
    let numbers = norm.lines().filter_map(|line| line.strip_prefix("- **")?.split([' ', '*']).next());
    numbers.filter(|number| SECTIONS.iter().any(|section| number.starts_with(section))).map(ToOwned::to_owned).collect()
}

/// The text of all tests: whole files of tests, and what follows `#[cfg(test)]` in others.
fn tests(directory: &Path, texts: &mut String) {
    for entry in fs::read_dir(directory).expect("a directory of the workspace") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            tests(&path, texts);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            let is_test = path.file_name().is_some_and(|name| name == "tests.rs")
                || path.components().any(|part| part.as_os_str() == "tests");
            let from = if is_test { Some(0) } else { text.find("#[cfg(test)]") };
            texts.push_str(from.map_or("", |from| &text[from..]));
        }
    }
}

/// Whether a text cites a statement, and not only one whose number begins like it.
fn cites(text: &str, number: &str) -> bool {
    let citation = format!("SG-{number}");
    text.match_indices(&citation)
        .any(|(at, _)| !text[at + citation.len()..].starts_with(|next: char| next.is_ascii_digit()))
}

#[test]
fn every_statement_is_cited_by_a_test() {
    let mut texts = String::new();
    for directory in ["tests/tests", "tests/src", "sg-agent/src", "sg-agent/tests", "sg-common/src"] {
        tests(&root().join(directory), &mut texts);
    }
    let statements = statements();
    assert!(statements.len() > 35, "the norm was read: {statements:?}");
    let missing: Vec<&String> = statements.iter().filter(|number| !cites(&texts, number)).collect();
    assert!(missing.is_empty(), "no test cites {missing:?}");
}

#[test]
fn a_longer_number_is_another_statement() {
    assert!(cites("(SG-1.1)", "1.1") && cites("SG-1.1", "1.1"));
    assert!(!cites("SG-1.10, SG-1.12", "1.1"));
}
