//! The compiler for `bpfel-unknown-none` and bpf-linker: finds them, or installs them. `crate::ebpf` uses them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, bail};

use super::{apt_has, apt_install, apt_update};
use crate::workspace::{self, clean_environment};
use crate::{cmd, ui};

/// The eBPF target.
pub const TARGET: &str = "bpfel-unknown-none";

/// Debian's compiler with a prebuilt `core` for the target.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
/// Where that compiler is, beside any rustup toolchain.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// The last bpf-linker that loads the LLVM inside a compiler's own libLLVM, and so needs no LLVM packages
/// and is always as new as the compiler that makes the bitcode.
const LINKER_VERSION: &str = "0.10.3";
/// What is left to the user where nothing can be installed.
const BY_HAND: &str = "rustup toolchain install nightly --component rust-src";

/// A compiler that can build for [`TARGET`].
pub enum Compiler {
    /// A nightly with the standard library's source: `core` is built along.
    Nightly {
        /// The toolchain's name for rustup.
        toolchain: String,
    },
    /// A compiler that has `core` for the target already.
    Prebuilt {
        /// The compiler.
        rustc: PathBuf,
    },
}

impl Compiler {
    /// The compiler that is there, or the one that could be installed.
    pub fn ensure() -> Result<Self> {
        if let Some(found) = Self::find() {
            return Ok(found);
        }
        let mut failures = Vec::new();
        for install in [install_prebuilt, install_nightly] {
            match install() {
                Ok(()) => match Self::find() {
                    Some(found) => return Ok(found),
                    None => failures.push(anyhow!("what was installed has no core for {TARGET}")),
                },
                Err(error) => failures.push(error),
            }
            cmd::check_interrupted()?;
        }
        let reasons: Vec<_> = failures.iter().map(|error| format!("{error:#}")).collect();
        bail!("no compiler for {TARGET} ({}): run `{BY_HAND}` where downloads work", reasons.join("; "))
    }

    fn find() -> Option<Self> {
        let nightly = nightlies().into_iter().find(|toolchain| {
            sysroot(Command::new("rustup").args(["run", toolchain, "rustc"]))
                .is_some_and(|root| root.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file())
        });
        if let Some(toolchain) = nightly {
            return Some(Self::Nightly { toolchain });
        }
        let rustc = PathBuf::from(DEBIAN_RUSTC);
        let prebuilt = sysroot(&mut Command::new(&rustc))
            .is_some_and(|root| root.join("lib/rustlib").join(TARGET).join("lib").is_dir());
        prebuilt.then_some(Self::Prebuilt { rustc })
    }

    /// One line that says which compiler this is.
    pub fn describe(&self) -> String {
        let version = cmd::stdout(self.rustc().arg("--version")).unwrap_or_else(|_| "rustc".to_owned());
        match self {
            Self::Nightly { toolchain } => {
                format!("{version} (rustup's {toolchain}, core built from rust-src)")
            }
            Self::Prebuilt { rustc } => format!("{version} ({}, prebuilt core)", rustc.display()),
        }
    }

    /// cargo with this compiler; target and flags are the caller's.
    pub fn cargo(&self) -> Command {
        let mut command = match self {
            Self::Nightly { toolchain } => {
                let mut command = Command::new("rustup");
                command.args(["run", toolchain, "cargo"]).env_remove("RUSTC");
                command
            }
            Self::Prebuilt { rustc } => {
                let mut command = Command::new(workspace::cargo_program());
                // aya-ebpf uses unstable features, which a stable compiler takes only so.
                command.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        clean_environment(&mut command);
        command.env_remove("RUSTC_WRAPPER").env_remove("RUSTC_WORKSPACE_WRAPPER").env_remove("CARGO_BUILD_TARGET");
        command
    }

    /// Arguments that cargo needs after its subcommand.
    pub fn cargo_args(&self) -> &'static [&'static str] {
        match self {
            Self::Nightly { .. } => &["--target", TARGET, "-Z", "build-std=core"],
            Self::Prebuilt { .. } => &["--target", TARGET],
        }
    }

    /// LLVM's version inside the compiler, as it tells it.
    pub fn llvm_version(&self) -> Option<String> {
        let told = cmd::stdout(self.rustc().arg("-vV")).ok()?;
        told.lines().find_map(|line| line.strip_prefix("LLVM version: ")).map(str::to_owned)
    }

    /// A directory with nothing but a link to the libLLVM that the compiler itself uses, for
    /// `LD_LIBRARY_PATH`: a bpf-linker that loads its LLVM takes the first `libLLVM*` that it meets.
    pub fn llvm_dir(&self) -> Result<PathBuf> {
        let dir = workspace::target().join("tools/llvm");
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let link = dir.join("libLLVM.so");
        let library = self.llvm_library();
        if std::fs::read_link(&link).ok() != library {
            std::fs::remove_file(&link).ok();
            if let Some(library) = library {
                std::os::unix::fs::symlink(&library, &link)
                    .with_context(|| format!("cannot link {} to {}", link.display(), library.display()))?;
            }
        }
        Ok(dir)
    }

    fn llvm_library(&self) -> Option<PathBuf> {
        let rustc = match self {
            Self::Nightly { .. } => sysroot(&mut self.rustc())?.join("bin/rustc"),
            Self::Prebuilt { rustc } => rustc.clone(),
        };
        let mut ldd = Command::new("ldd");
        clean_environment(&mut ldd);
        let needs = cmd::stdout(ldd.arg(rustc)).ok()?;
        let line = needs.lines().find(|line| line.trim_start().starts_with("libLLVM"))?;
        let path = line.split("=> ").nth(1)?.split_whitespace().next()?;
        Path::new(path).canonicalize().ok()
    }

    fn rustc(&self) -> Command {
        let mut command = match self {
            Self::Nightly { toolchain } => {
                let mut command = Command::new("rustup");
                command.args(["run", toolchain, "rustc"]);
                command
            }
            Self::Prebuilt { rustc } => Command::new(rustc),
        };
        clean_environment(&mut command);
        command
    }
}

/// bpf-linker.
pub fn ensure_linker() -> Result<PathBuf> {
    super::cargo::ensure("bpf-linker", Some(LINKER_VERSION), "it links eBPF objects (about a minute)")
}

fn install_prebuilt() -> Result<()> {
    if cmd::find("apt-get").is_none() {
        bail!("apt-get isn't there");
    }
    let known = || DEBIAN_PACKAGES.iter().all(|package| apt_has(package));
    if !known() && is_debian() {
        ui::step("fetching apt's package lists: a compiler for eBPF is looked for there");
        apt_update()?;
    }
    if !known() {
        bail!("apt doesn't have {}", DEBIAN_PACKAGES.join(" "));
    }
    ui::step(&format!("installing {}: a compiler with `core` for {TARGET}", DEBIAN_PACKAGES.join(" ")));
    apt_install(&DEBIAN_PACKAGES)
}

fn install_nightly() -> Result<()> {
    if cmd::find("rustup").is_none() {
        bail!("rustup isn't there");
    }
    let mut install = Command::new("rustup");
    if let Some(toolchain) = nightlies().first() {
        ui::step(&format!("adding rust-src to {toolchain}: `core` for {TARGET} is built from it"));
        install.args(["component", "add", "rust-src", "--toolchain", toolchain]);
    } else {
        ui::step(&format!("installing rustup's nightly with rust-src: it builds `core` for {TARGET}"));
        install.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
    }
    cmd::run(&mut install)
}

fn nightlies() -> Vec<String> {
    let list = cmd::stdout(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    names.filter(|name| name.starts_with("nightly")).map(str::to_owned).collect()
}

fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    clean_environment(rustc);
    cmd::stdout(rustc.args(["--print", "sysroot"])).ok().map(PathBuf::from)
}

fn is_debian() -> bool {
    std::fs::read_to_string("/etc/os-release").is_ok_and(|text| text.lines().any(|line| line == "ID=debian"))
}
