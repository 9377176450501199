//! What is put into an instance's container before its first start: the key pair's public key, and the user data. Owns
//! their places and form; no text of the API is ever part of a command or a path.

use std::io::{self, Read as _};

/// Root's keys, as OpenSSH and Dropbear read them.
pub(super) const AUTHORIZED_KEYS: &str = "root/.ssh/authorized_keys";
/// Where cloud-init puts a script.
pub(super) const SCRIPT: &str = "var/lib/cloud/instance/scripts/user-data";
/// Where cloud-init writes what it says.
pub(super) const OUTPUT: &str = "var/log/cloud-init-output.log";
/// There from right before the script's start: it is run once in an instance's life.
pub(super) const DONE: &str = "var/lib/cloud/instance/sem/user-data";
/// Runs the script. A constant, but for the script that is a file by then.
pub(super) const RUN: [&str; 3] =
    ["/bin/sh", "-c", "exec /var/lib/cloud/instance/scripts/user-data >>/var/log/cloud-init-output.log 2>&1"];

/// EC2's own limit is 16 KiB before encoding; emulators take more.
const LONGEST_SCRIPT: usize = 1 << 20;
/// No authorized_keys is that long.
const LONGEST_KEYS: u64 = 1 << 20;

/// User data that can be run: cloud-init runs what begins like a script, and so does this.
///
/// # Errors
/// Why it can't, for a message.
pub(super) fn script(data: &[u8]) -> Result<&[u8], &'static str> {
    match data {
        _ if data.len() > LONGEST_SCRIPT => Err("it is longer than 1 MiB"),
        [b'#', b'!', ..] => Ok(data),
        [0x1f, 0x8b, ..] => Err("it is compressed; give the script itself"),
        _ if data.starts_with(b"#cloud-config") => Err("it is a #cloud-config; only scripts, from #! on, are run"),
        _ => Err("it does not begin with #!; only scripts are run"),
    }
}

/// A public key that may be written to a line of its own.
///
/// # Errors
/// Why it may not, for a message.
pub(super) fn public_key(text: &str) -> Result<&str, &'static str> {
    let key = text.trim();
    let plain = key.bytes().all(|byte| (b' '..0x7f).contains(&byte));
    if !plain || key.is_empty() {
        return Err("its public key is not one line of text");
    }
    // Options before the key's type would be the API's to choose.
    let known = ["ssh-rsa ", "ssh-ed25519 ", "ecdsa-sha2-", "sk-ssh-ed25519@", "sk-ecdsa-sha2-"];
    if known.iter().any(|kind| key.starts_with(kind)) { Ok(key) } else { Err("its public key is of no known type") }
}

/// The archive of what a container gets; `keys` are those that its image has already.
///
/// # Errors
/// None in practice: it is written to memory.
pub(super) fn archive(keys: &str, key: Option<&str>, script: Option<&[u8]>) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    if let Some(key) = key {
        let apart = if keys.is_empty() || keys.ends_with('\n') { "" } else { "\n" };
        add(&mut archive, AUTHORIZED_KEYS, 0o600, format!("{keys}{apart}{key}\n").as_bytes())?;
    }
    if let Some(script) = script {
        add(&mut archive, SCRIPT, 0o700, script)?;
        add(&mut archive, OUTPUT, 0o640, b"")?;
    }
    archive.into_inner()
}

/// The archive of the mark that the script is run.
///
/// # Errors
/// None in practice: it is written to memory.
pub(super) fn done() -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    add(&mut archive, DONE, 0o644, b"")?;
    archive.into_inner()
}

fn add(archive: &mut tar::Builder<Vec<u8>>, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    archive.append_data(&mut header, path, content)
}

/// The one file's text in an archive that Docker made of it; nothing where it is no text.
pub(super) fn first_text(archive: &[u8]) -> String {
    let mut archive = tar::Archive::new(archive);
    let entry = archive.entries().ok().and_then(|mut entries| entries.next()?.ok());
    let mut text = String::new();
    let read = entry.map(|entry| entry.take(LONGEST_KEYS).read_to_string(&mut text));
    if matches!(read, Some(Ok(_))) { text } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_scripts_and_keys_go_in() {
        assert!(script(b"#!/bin/sh\necho hi").is_ok());
        for bad in [&b""[..], b"#cloud-config\n", b"echo hi", b"\x1f\x8b\x08", &[b'#'; LONGEST_SCRIPT + 1]] {
            assert!(script(bad).is_err());
        }
        assert_eq!(public_key("ssh-ed25519 AAAA me@here\n"), Ok("ssh-ed25519 AAAA me@here"));
        for bad in ["", "ssh-rsa A\nssh-rsa B", "command=\"id\" ssh-rsa A", "x", "ssh-rsa \u{1b}[31m"] {
            assert!(public_key(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_images_own_keys_stay() {
        let made = archive("ssh-rsa OLD", Some("ssh-rsa NEW"), Some(b"#!/bin/sh\n")).unwrap();
        assert_eq!(first_text(&made), "ssh-rsa OLD\nssh-rsa NEW\n");
        let mut read = tar::Archive::new(&*made);
        let paths: Vec<_> = read.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned()).collect();
        assert_eq!(paths, [AUTHORIZED_KEYS, SCRIPT, OUTPUT].map(std::path::PathBuf::from));
        assert_eq!(first_text(b"no archive"), "");
        assert!(RUN[2].contains(SCRIPT) && RUN[2].contains(OUTPUT));
    }
}
