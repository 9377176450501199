//! Runs test programs on another kernel: Debian's, in QEMU, without acceleration and without root. Owns the set-up of
//! kernel and QEMU; `initramfs` puts the machine's files together, `machine` runs it.

mod initramfs;
mod machine;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::deps::{self, Tool};
use crate::libtest::Counts;
use crate::{cmd, ui, workspace};
use initramfs::Initramfs;

/// The oldest kernel that is supported; `docs/kernels.md` says why.
pub const OLDEST: &str = "6.1";

const QEMU: Tool = deps::tool("qemu-system-x86_64", "qemu-system-x86", "other kernels are booted in it");
const TC: Tool = deps::tool("tc", "iproute2", "tests look at filters with it");
const DPKG_DEB: Tool = deps::tool("dpkg-deb", "dpkg", "kernels are unpacked with it");
/// QEMU's package only recommends it.
const FIRMWARE: (&str, &str) = ("/usr/share/seabios/bios-256k.bin", "seabios");

/// What the tests need and Debian's kernels have as modules, each after those that it depends on. One that a kernel
/// has built in isn't there as a file.
const MODULES: [&str; 13] = [
    "llc",
    "stp",
    "bridge",
    "veth",
    "dummy",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "nfnetlink",
    "libcrc32c",
    "nf_tables",
    "nft_meta_bridge",
];

/// A kernel, unpacked.
struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

/// What runs in the machine.
pub struct Job<'a> {
    /// The kernel's version: `6.1`.
    pub version: &'a str,
    /// The agent.
    pub agent: &'a Path,
    /// The test programs, one after the other.
    pub programs: &'a [Program],
    /// Their environment.
    pub environment: &'a [(&'a str, OsString)],
}

/// A test program and its arguments.
pub struct Program {
    /// Where it is on this machine.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// Makes sure that QEMU and the user land of the machine are there.
pub fn ensure_tools() -> Result<()> {
    deps::ensure_tools(&[QEMU, DPKG_DEB, TC, deps::IP, deps::BUSYBOX])?;
    if !Path::new(FIRMWARE.0).exists() {
        ui::step(&format!("installing {}: QEMU's machine starts with it", FIRMWARE.1));
        deps::apt_install(&[FIRMWARE.1])?;
    }
    Ok(())
}

/// Boots the kernel and runs the programs there; adds up what they count.
///
/// # Errors
/// What went wrong with the set-up, and the programs that failed.
pub fn run(job: &Job, counts: &mut Counts) -> Result<()> {
    let kernel = Kernel::ensure(job.version)?;
    let directory = directory(job.version);
    let archive = directory.join("initramfs");
    {
        let mut files = Initramfs::new(&archive)?;
        files.program(&deps::find(&deps::BUSYBOX)?, "bin/busybox")?;
        files.program(&deps::find(&deps::IP)?, "bin/ip")?;
        files.program(&deps::find(&TC)?, "bin/tc")?;
        files.program(job.agent, "bin/sg-agent")?;
        for (place, program) in job.programs.iter().enumerate() {
            files.program(&program.path, &format!("tests/{place}"))?;
        }
        let modules = kernel.modules(&mut files)?;
        files.file("init", init(job, &modules).as_bytes(), true)?;
        files.finish()?;
    }
    machine::run(&kernel.image, &archive, &directory.join("console.log"), job, counts)
}

/// What the kernel starts: mounts, modules, then each program and a line with how it ended. Everything of this goes
/// to the second serial port, as the kernel talks on the first.
fn init(job: &Job, modules: &[String]) -> String {
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin HOME=/tmp\n\
         mount -t devtmpfs dev /dev\n\
         exec </dev/null >/dev/ttyS1 2>&1\n\
         stty -F /dev/ttyS1 raw -echo\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         mount -t cgroup2 cgroup /sys/fs/cgroup\n\
         mount -t tmpfs tmp /tmp\n\
         mount -t tmpfs run /run\n\
         ip link set lo up\n",
    );
    for module in modules {
        script += &format!("insmod {module}\n");
    }
    for (name, value) in job.environment {
        script += &format!("export {name}={}\n", cmd::quote(&value.to_string_lossy()));
    }
    script += &format!("echo \"{}$(uname -r)\"\n", machine::BOOTED);
    for (place, program) in job.programs.iter().enumerate() {
        let words = program.arguments.iter().map(|word| cmd::quote(&word.to_string_lossy()));
        let arguments = words.collect::<Vec<_>>().join(" ");
        script += &format!("/tests/{place} {arguments}; echo \"{}{place} $?\"\n", machine::ENDED);
    }
    // The port has a buffer.
    script + "sleep 1\npoweroff -f\n"
}

/// Where everything of a kernel is kept.
fn directory(version: &str) -> PathBuf {
    workspace::target().join("kernels").join(version)
}

impl Kernel {
    /// The kernel from `target/kernels`, or from Debian's packages.
    fn ensure(version: &str) -> Result<Self> {
        let directory = directory(version);
        if let Some(kernel) = Self::find(&directory) {
            return Ok(kernel);
        }
        let package = package(version)?;
        ui::step(&format!("fetching {package}: the tests run on Linux {version}, too"));
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let download = tempfile::tempdir_in(&directory)?;
        let mut fetch = Command::new("apt-get");
        cmd::with_progress(
            &format!("apt-get download {package}"),
            fetch.args(["-q", "-o", "APT::Sandbox::User=root", "download", &package]).current_dir(download.path()),
        )?;
        let archive = fs::read_dir(download.path())?.flatten().next().context("apt-get downloaded nothing")?;
        cmd::with_progress("dpkg-deb", Command::new("dpkg-deb").arg("-x").arg(archive.path()).arg(&directory))?;
        Self::find(&directory).with_context(|| format!("{package} has no kernel"))
    }

    fn find(directory: &Path) -> Option<Self> {
        let only = |directory: PathBuf, prefix: &str| {
            let entries = fs::read_dir(directory).ok()?.flatten();
            entries
                .map(|entry| entry.path())
                .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        };
        // Debian 13's packages have their modules below usr.
        let modules =
            only(directory.join("lib/modules"), "").or_else(|| only(directory.join("usr/lib/modules"), ""))?;
        Some(Self { image: only(directory.join("boot"), "vmlinuz-")?, modules })
    }

    /// Adds the modules that the tests need; their paths in the machine.
    fn modules(&self, files: &mut Initramfs) -> Result<Vec<String>> {
        let order = fs::read_to_string(self.modules.join("modules.order")).context("a kernel without modules.order")?;
        let mut added = Vec::new();
        for module in MODULES {
            let end = format!("/{module}.ko");
            let Some(path) = order.lines().find(|line| line.ends_with(&end)) else { continue };
            let path = self.modules.join(path);
            let text = match fs::read(&path) {
                Ok(text) => text,
                Err(_) => {
                    let mut xz = Command::new("xz");
                    let xz = xz.arg("-dc").arg(path.with_extension("ko.xz"));
                    let output = cmd::output(xz)?;
                    ensure!(output.status.success(), "{} failed: {}", cmd::show(xz), output.status);
                    output.stdout
                }
            };
            let place = format!("modules/{module}.ko");
            files.file(&place, &text, false)?;
            added.push(format!("/{place}"));
        }
        Ok(added)
    }
}

/// The newest package of that version that apt knows: of the cloud kernels, which are half as large, if there is one.
fn package(version: &str) -> Result<String> {
    let known = || -> Result<Option<String>> {
        let names = cmd::stdout(Command::new("apt-cache").args(["pkgnames", &format!("linux-image-{version}.")]))?;
        Ok(newest(names.lines()).map(str::to_owned))
    };
    if let Some(package) = known()? {
        return Ok(package);
    }
    deps::apt_update()?;
    known()?.with_context(|| {
        format!(
            "apt has no linux-image-{version}.*-amd64: add the Debian release that has it to apt's sources, or unpack \
             the package below {}",
            directory(version).display()
        )
    })
}

fn newest<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let numbers = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    names
        .filter(|name| name.ends_with("-amd64") && !name.ends_with("-rt-amd64"))
        .max_by_key(|name| (name.ends_with("-cloud-amd64"), numbers(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_cloud_kernel_is_taken() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-amd64",
            "linux-image-6.1.0-58-cloud-amd64-unsigned",
            "linux-image-6.1.0-58-cloud-amd64-dbg",
            "linux-image-6.1.0-58-rt-amd64",
        ];
        assert_eq!(newest(names.into_iter()), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest(names.into_iter().skip(2)), Some("linux-image-6.1.0-57-amd64"));
        assert_eq!(newest(names.into_iter().skip(3)), None);
    }

    #[test]
    fn programs_are_run_one_after_the_other_and_quoted() {
        let program = |path: &str| Program { path: path.into(), arguments: vec!["it's".into()] };
        let programs = [program("a"), program("b")];
        let environment = [("SG_X", "1 2".into())];
        let job = Job { version: "6.1", agent: Path::new("agent"), programs: &programs, environment: &environment };
        let script = init(&job, &["/modules/veth.ko".to_owned()]);
        let lines: Vec<_> = script.lines().collect();
        assert!(lines.contains(&"export SG_X='1 2'") && lines.contains(&"insmod /modules/veth.ko"), "{script}");
        assert!(lines.contains(&r#"/tests/1 'it'\''s'; echo "sg-vm: ended 1 $?""#), "{script}");
        assert!(script.ends_with("poweroff -f\n"), "{script}");
    }
}
