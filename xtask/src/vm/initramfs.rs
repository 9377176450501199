//! The machine's files, as an archive that the kernel unpacks into memory (`newc`, documented in the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`). Knows nothing of what the files are for.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cmd;

const DIRECTORIES: [&str; 9] = ["bin", "dev", "proc", "sys", "tmp", "run", "tests", "modules", "etc"];
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const PLAIN: u32 = 0o100_644;

/// An archive that is being written.
pub struct Initramfs {
    path: PathBuf,
    file: BufWriter<File>,
    written: u64,
    /// What is there already: programs share libraries.
    names: BTreeSet<String>,
}

impl Initramfs {
    /// Begins an archive, with the directories that every machine has.
    pub fn new(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut archive =
            Self { path: path.to_owned(), file: BufWriter::new(file), written: 0, names: BTreeSet::new() };
        for directory in DIRECTORIES {
            archive.entry(directory, DIRECTORY, &[])?;
        }
        Ok(archive)
    }

    /// Adds a program without its debugging information, and the shared libraries that it needs at their own paths.
    pub fn program(&mut self, program: &Path, name: &str) -> Result<()> {
        let stripped = tempfile::NamedTempFile::new()?;
        let mut strip = Command::new("strip");
        let is_stripped = cmd::succeeds(strip.arg("--strip-debug").arg("-o").arg(stripped.path()).arg(program));
        let from = if is_stripped { stripped.path() } else { program };
        let text = fs::read(from).with_context(|| format!("cannot read {}", program.display()))?;
        self.file(name, &text, true)?;
        let mut ldd = Command::new("ldd");
        // It fails for programs without any.
        let needs = cmd::output(ldd.arg(program))?;
        let words = String::from_utf8_lossy(&needs.stdout).into_owned();
        for library in words.split_whitespace().filter(|word| word.starts_with('/')) {
            let name = library.trim_start_matches('/');
            if !self.names.contains(name) {
                let text = fs::read(library).with_context(|| format!("cannot read {library}"))?;
                self.file(name, &text, true)?;
            }
        }
        Ok(())
    }

    /// Adds a file, and the directories that it is in.
    pub fn file(&mut self, name: &str, text: &[u8], executable: bool) -> Result<()> {
        let mut parents: Vec<_> = Path::new(name).ancestors().skip(1).filter_map(Path::to_str).collect();
        parents.retain(|parent| !parent.is_empty());
        for parent in parents.into_iter().rev() {
            self.entry(parent, DIRECTORY, &[])?;
        }
        self.entry(name, if executable { PROGRAM } else { PLAIN }, text)
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.file.flush().with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn entry(&mut self, name: &str, mode: u32, text: &[u8]) -> Result<()> {
        if !self.names.insert(name.to_owned()) {
            return Ok(());
        }
        let size = u32::try_from(text.len()).with_context(|| format!("{name} is too large"))?;
        let (number, links) = (self.names.len() as u32, 1);
        // Number, mode, user, group, links, time, size, four device numbers, the name's length with its zero, checksum.
        let fields = [number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        let mut header = String::from("070701");
        header.extend(fields.iter().map(|field| format!("{field:08x}")));
        header.push_str(name);
        header.push('\0');
        self.write(header.as_bytes())?;
        self.pad()?;
        self.write(text)?;
        self.pad()
    }

    fn pad(&mut self) -> Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.write(&[0; 3][..missing as usize])
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.file.write_all(bytes).with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_what_was_put_in() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("archive");
        let mut archive = Initramfs::new(&path).unwrap();
        archive.file("etc/deep/file", b"hello", false).unwrap();
        archive.file("init", b"#!/bin/sh\n", true).unwrap();
        archive.finish().unwrap();
        let listed = cmd::stdout(
            Command::new("busybox").args(["cpio", "-t", "-v", "-F"]).arg(&path).current_dir(directory.path()),
        );
        let Ok(listed) = listed else { panic!("busybox can't read the archive: {listed:?}") };
        assert!(listed.contains("drwxr-xr-x") && listed.contains("etc/deep\n"), "{listed}");
        assert!(listed.lines().any(|line| line.starts_with("-rw-r--r--") && line.contains(" 5 ")), "{listed}");
        assert!(listed.lines().any(|line| line.starts_with("-rwxr-xr-x") && line.ends_with("init")), "{listed}");
        assert!(!listed.contains("TRAILER"), "{listed}");
    }
}
