//! Images made of this machine's own files, since nothing can be pulled everywhere, and that of launched instances:
//! BusyBox, and Dropbear as a real SSH server. Starting containers from them is the agent's.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::deps::{self, docker::Engine};
use crate::{cmd, ui};

/// The agent's default for launched instances (`DEFAULT_IMAGE` in sg-agent/src/launcher/images.rs).
pub const INSTANCE: &str = "sg-agent/instance:latest";

/// Makes sure of the image of launched instances.
pub fn ensure_instance(engine: &Engine) -> Result<()> {
    if cmd::succeeds(engine.docker().args(["image", "inspect", INSTANCE])) {
        return Ok(());
    }
    make_instance(engine)
}

/// Makes the image of launched instances: an SSH server on port 22, and a shell. Root's keys come with the instance.
pub fn make_instance(engine: &Engine) -> Result<()> {
    deps::ensure_tools(&[deps::BUSYBOX, deps::DROPBEAR])?;
    ui::step(&format!("making the image {INSTANCE} of BusyBox and Dropbear: launched instances run it"));
    let root = tempfile::tempdir().context("cannot make a temporary directory")?;
    fill(root.path()).context("cannot make the instances' image")?;
    // -R makes the host's keys, -F stays in the foreground, -E logs to standard error.
    load(engine, root.path(), INSTANCE, &[r#"CMD ["/usr/sbin/dropbear", "-R", "-F", "-E"]"#, "EXPOSE 22"])
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

fn fill(root: &Path) -> Result<()> {
    for dir in ["bin", "usr/sbin", "etc/dropbear", "root", "tmp", "var/run", "var/log", "proc", "sys", "dev"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = cmd::find("busybox").context("busybox isn't there: install busybox-static")?;
    for applet in cmd::stdout(Command::new(&busybox).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    fs::copy(busybox, root.join("bin/busybox"))?;
    let dropbear = cmd::find("dropbear").context("dropbear isn't there: install dropbear-bin")?;
    fs::copy(&dropbear, root.join("usr/sbin/dropbear"))?;
    copy_libraries(root, &dropbear)?;
    fs::write(root.join("etc/passwd"), "root:*:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    // Dropbear lets in only users whose shell is listed.
    fs::write(root.join("etc/shells"), "/bin/sh\n")?;
    // Dropbear ignores keys that others could write.
    for (path, mode) in [(root.to_owned(), 0o755), (root.join("root"), 0o700), (root.join("tmp"), 0o1777)] {
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
