//! Images made of this machine's own files, since nothing can be pulled everywhere, and that of the demo's instances:
//! BusyBox, and Dropbear as a real SSH server. Starting containers from them is the caller's.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::cmd;
use crate::deps::docker::Engine;

/// The applets that the session calls.
const APPLETS: [&str; 7] = ["sh", "ls", "cat", "echo", "hostname", "nc", "sleep"];

/// Makes an image whose root takes this SSH key, and which starts an SSH server on port 22.
pub fn import(engine: &Engine, tag: &str, authorized_key: &str) -> Result<()> {
    let root = tempfile::tempdir().context("cannot make a temporary directory")?;
    fill(root.path(), authorized_key).context("cannot make the instances' image")?;
    // -R makes the host's keys, -F stays in the foreground, -E logs to standard error.
    load(engine, root.path(), tag, &[r#"CMD ["/usr/sbin/dropbear", "-R", "-F", "-E"]"#])
}

/// Makes an image of a directory; `changes` are lines of a Dockerfile.
pub fn load(engine: &Engine, root: &Path, tag: &str, changes: &[&str]) -> Result<()> {
    let mut tar = Command::new("tar")
        // The files are root's in the image, whoever made them here.
        .args(["--owner=0", "--group=0", "-c", "-C"])
        .arg(root)
        .arg(".")
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run tar")?;
    let archive = tar.stdout.take().context("tar has no output")?;
    let imported = engine
        .docker()
        .arg("import")
        .args(changes.iter().flat_map(|change| ["--change", change]))
        .args(["-", tag])
        .stdin(archive)
        .output()
        .context("cannot run docker import")?;
    let archived = tar.wait()?;
    let said = String::from_utf8_lossy(&imported.stderr);
    ensure!(imported.status.success(), "docker import failed: {}", said.trim());
    ensure!(archived.success(), "tar failed: {archived}");
    Ok(())
}

fn fill(root: &Path, authorized_key: &str) -> Result<()> {
    for dir in ["bin", "usr/sbin", "etc/dropbear", "root/.ssh", "tmp", "var/run", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = cmd::find("busybox").context("busybox isn't there: install busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let dropbear = cmd::find("dropbear").context("dropbear isn't there: install dropbear-bin")?;
    fs::copy(&dropbear, root.join("usr/sbin/dropbear"))?;
    copy_libraries(root, &dropbear)?;
    fs::write(root.join("etc/passwd"), "root:*:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    // Dropbear lets in only users whose shell is listed.
    fs::write(root.join("etc/shells"), "/bin/sh\n")?;
    let keys = root.join("root/.ssh/authorized_keys");
    fs::write(&keys, format!("{}\n", authorized_key.trim()))?;
    // Dropbear ignores keys that others could write.
    for (path, mode) in
        [(root.to_owned(), 0o755), (root.join("root"), 0o700), (root.join("root/.ssh"), 0o700), (keys, 0o600)]
    {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Puts a program's shared libraries under `root`, where it will look for them.
pub fn copy_libraries(root: &Path, program: &Path) -> Result<()> {
    for library in libraries(program)? {
        let copy = root.join(library.strip_prefix("/").unwrap_or(&library));
        fs::create_dir_all(copy.parent().unwrap_or(root))?;
        fs::copy(&library, &copy).with_context(|| format!("cannot copy {}", library.display()))?;
    }
    Ok(())
}

/// The shared libraries of a program, the loader included, by the paths that it asks for.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = cmd::stdout(Command::new("ldd").arg(program).env_remove("LD_LIBRARY_PATH"))?;
    Ok(parse_ldd(&listed))
}

fn parse_ldd(listed: &str) -> Vec<PathBuf> {
    let word = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    listed.lines().filter_map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_read_from_ldd() {
        let listed = "\tlinux-vdso.so.1 (0x00007fff)\n\
                      \tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f11)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f12)\n";
        let expected = ["/lib/x86_64-linux-gnu/libz.so.1", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse_ldd(listed), expected);
    }
}
