//! `cargo xtask fuzz`: the properties with as many packets as are wanted, and the libFuzzer targets for as long as is
//! wanted. Owns how they are run and where what they find is kept; what is checked is in `tests/tests` and
//! `fuzz/checks`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use crate::ui::Progress;
use crate::{cmd, deps, ebpf, test, ui, workspace};

/// The test program with the properties, whose packets `SG_FUZZ_VERDICTS` numbers.
const PROPERTIES: &str = "kernel_properties";

/// Three to a CPU of a small machine.
const PROCESSES: u32 = 6;

/// From so many packets on an optimised build is the faster way.
const OPTIMIZED: u32 = 1_000_000;

/// Where proptest keeps the cases that failed, beside the tests; it runs them first ever after.
const REGRESSIONS: &str = "tests/tests/kernel_properties.regressions";

/// Longer inputs find little more, and slow down: the largest recorded answer has 24 KiB.
const MAX_LENGTH: u32 = 32_768;

/// How long a crash is made smaller, in seconds.
const MINIMIZING: u32 = 60;

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// How many packets the properties judge at least
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    verdicts: u32,
    /// How long each libFuzzer target runs
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u32,
    /// Run this only (may be repeated)
    #[arg(long, value_enum, value_name = "TARGET")]
    only: Vec<Target>,
}

/// What is fuzzed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The norm, the compiled tables and the kernel's programs say the same (root)
    Verdicts,
    /// Frames through the data path's decisions (nightly)
    Packet,
    /// The EC2 API's answers (nightly)
    Xml,
    /// The file of --rules (nightly)
    RulesFile,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Verdicts => "verdicts",
            Self::Packet => "packet",
            Self::Xml => "xml",
            Self::RulesFile => "rules_file",
        }
    }
}

/// How a target ended.
enum Outcome {
    Passed(String),
    Failed(String),
    Skipped(String),
}

/// Runs the targets, then says how each ended.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut targets = Target::value_variants().to_vec();
    targets.retain(|target| options.only.is_empty() || options.only.contains(target));
    ebpf::build()?;
    let mut outcomes = Vec::new();
    for target in targets {
        let outcome = match target {
            Target::Verdicts => verdicts(options.verdicts),
            _ => Fuzzer::ensure().and_then(|fuzzer| match fuzzer {
                Ok(fuzzer) => fuzzer.run(target, options.seconds),
                Err(missing) => Ok(Outcome::Skipped(missing)),
            }),
        };
        cmd::check_interrupted()?;
        outcomes.push((target, outcome.unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")))));
    }
    println!();
    let mut code = ExitCode::SUCCESS;
    for (target, outcome) in &outcomes {
        let (word, text) = match outcome {
            Outcome::Passed(text) => ("passed", text),
            Outcome::Failed(text) => ("failed", text),
            Outcome::Skipped(text) => ("skipped", text),
        };
        if matches!(outcome, Outcome::Failed(_)) {
            code = ExitCode::FAILURE;
        }
        println!("{:<11} {word:<8} {text}", target.name());
    }
    Ok(code)
}

/// The properties, as root, in several processes: the kernel takes its time whenever rules change (RCU), and the other
/// processes have the CPUs meanwhile. An optimised build, which takes minutes itself, saves most of what is left.
fn verdicts(number: u32) -> Result<Outcome> {
    if let Err(error) = cmd::ensure_root("to load the programs that are held against the norm") {
        return Ok(Outcome::Skipped(format!("{error:#}")));
    }
    deps::ensure_tools(&[deps::IP]).and_then(|()| deps::ensure_bpffs())?;
    let program =
        test::programs::build(&[PROPERTIES.to_owned()], if number < OPTIMIZED { &[] } else { &["--release"] })?
            .remove(0);
    ui::step(&format!("judging {number} packets: oracle, tables and kernel must agree"));
    let known = std::fs::read(workspace::root().join(REGRESSIONS)).ok();
    let started = Instant::now();
    let each = number.div_ceil(PROCESSES);
    let mut runs = (1..=PROCESSES).map(|name| Run::start(&program, each, name)).collect::<Result<Vec<_>>>()?;
    let mut failed = Vec::new();
    let mut progress = Progress::start("judging packets");
    for run in &mut runs {
        let status = cmd::wait(&mut run.child, || progress.tick())?;
        if !status.success() {
            failed.push(format!("{status}, see {}", run.log.display()));
        }
    }
    drop(progress);
    cmd::check_interrupted()?;
    if !failed.is_empty() {
        runs.iter().for_each(|run| eprintln!("{}", cmd::tail_of(&run.log)));
        let kept = std::fs::read(workspace::root().join(REGRESSIONS)).ok() != known;
        let kept = if kept { format!("; the case is kept in {REGRESSIONS}: commit it") } else { String::new() };
        return Ok(Outcome::Failed(format!("{}{kept}", failed.join(", "))));
    }
    let judged = runs.iter().map(Run::judged).sum::<Result<u64>>()?;
    ensure!(judged >= u64::from(number), "only {judged} packets were judged of {number}");
    let seconds = started.elapsed().as_secs();
    Ok(Outcome::Passed(format!("{judged} packets in {seconds} s, {} a second", judged / seconds.max(1))))
}

/// One process that judges packets.
struct Run {
    child: Child,
    log: PathBuf,
}

impl Run {
    fn start(program: &Path, verdicts: u32, name: u32) -> Result<Self> {
        let directory = workspace::root().join("tests");
        let environment = [
            ("CARGO_MANIFEST_DIR", directory.clone().into_os_string()),
            ("SG_FUZZ_VERDICTS", verdicts.to_string().into()),
            // A case that fails is made smaller, and each step would print one.
            ("RUST_BACKTRACE", "0".into()),
        ];
        let log = workspace::run_dir()?.join(format!("fuzz-verdicts-{name}.log"));
        let (stdout, stderr) = cmd::log_file(&log)?;
        let mut command = cmd::as_root(program, environment);
        command.current_dir(&directory).arg("--nocapture").stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let child = command.spawn().with_context(|| format!("cannot run {}", cmd::show(&command)))?;
        Ok(Self { child, log })
    }

    /// How many packets its properties judged, as they say themselves.
    fn judged(&self) -> Result<u64> {
        let text = std::fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        let counts = text.lines().filter_map(|line| Some(line.split_once("packets judged: ")?.1));
        let judged = counts.map(|count| count.parse::<u64>().with_context(|| format!("{count:?} is no count")));
        judged.sum::<Result<u64>>().with_context(|| self.log.display().to_string())
    }
}

/// cargo-fuzz with a nightly compiler.
struct Fuzzer {
    toolchain: String,
    directory: PathBuf,
}

impl Fuzzer {
    /// Finds both, installing cargo-fuzz if need be; a nightly is the user's to install, and said to be missing.
    fn ensure() -> Result<Result<Self, String>> {
        let missing = "no nightly compiler, which libFuzzer's instrumentation needs: run \
                       `rustup toolchain install nightly --profile minimal`";
        if cmd::find("rustup").is_none() {
            return Ok(Err(missing.to_owned()));
        }
        let toolchains = cmd::stdout(Command::new("rustup").args(["toolchain", "list"]))?;
        let Some(toolchain) = nightly(&toolchains) else { return Ok(Err(missing.to_owned())) };
        deps::cargo::ensure("cargo-fuzz", None, "it builds and runs the libFuzzer targets")?;
        Ok(Ok(Self { toolchain, directory: workspace::root().join("fuzz") }))
    }

    /// Runs a target from its seeds, its regressions and what earlier runs found interesting.
    fn run(&self, target: Target, seconds: u32) -> Result<Outcome> {
        let name = target.name();
        let folder = |kind: &str| self.directory.join(kind).join(name);
        let (corpus, artifacts, regressions) = (folder("corpus"), folder("artifacts"), folder("regressions"));
        for made in [&corpus, &artifacts, &regressions] {
            std::fs::create_dir_all(made).with_context(|| format!("cannot make {}", made.display()))?;
        }
        ui::step(&format!("fuzzing {name} for {seconds} s (the first build takes minutes)"));
        let before = files(&artifacts)?;
        let mut command = self.cargo(&["run", name])?;
        command.args([&corpus, &folder("corpus-seeds"), &regressions]).arg("--");
        command.args([format!("-max_total_time={seconds}"), format!("-max_len={MAX_LENGTH}")]);
        command.args(["-print_final_stats=1", "-timeout=10"]);
        let ended = cmd::run(&mut command);
        cmd::check_interrupted()?;
        let found: Vec<PathBuf> = files(&artifacts)?.difference(&before).cloned().collect();
        let Err(error) = ended else {
            return Ok(Outcome::Passed(format!("{seconds} s, {} inputs worth keeping", files(&corpus)?.len())));
        };
        if found.is_empty() {
            return Err(error);
        }
        let kept = found.iter().map(|crash| self.keep(name, crash, &regressions)).collect::<Result<Vec<_>>>()?;
        Ok(Outcome::Failed(format!("kept as {}: commit it with what mends it", kept.join(", "))))
    }

    /// Makes a crash as small as it gets within a minute, and keeps it where the tests replay it.
    fn keep(&self, name: &str, crash: &Path, regressions: &Path) -> Result<String> {
        ui::step(&format!("making {} smaller", crash.display()));
        let artifacts = crash.parent().unwrap_or(regressions);
        let before = files(artifacts)?;
        let mut command = self.cargo(&["tmin", name])?;
        command.arg(crash).args(["--", &format!("-max_total_time={MINIMIZING}")]);
        // That it gets no smaller is no failure.
        if let Err(error) = cmd::with_progress("cargo fuzz tmin", &mut command) {
            ui::note(&format!("{error:#}"));
        }
        cmd::check_interrupted()?;
        let smaller = files(artifacts)?.difference(&before).cloned().collect::<Vec<_>>();
        let length = |path: &PathBuf| path.metadata().map_or(u64::MAX, |data| data.len());
        let smallest = smaller.iter().min_by_key(|path| length(path)).map_or(crash, PathBuf::as_path);
        let file = smallest.file_name().context("a crash without a name")?;
        let kept = regressions.join(file);
        std::fs::copy(smallest, &kept).with_context(|| format!("cannot write {}", kept.display()))?;
        Ok(format!("fuzz/regressions/{name}/{}", file.to_string_lossy()))
    }

    fn cargo(&self, arguments: &[&str]) -> Result<Command> {
        let mut path = vec![workspace::target().join("tools/bin")];
        path.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
        let path: OsString = std::env::join_paths(path).context("the path of target/ has a colon")?;
        let mut command = Command::new("rustup");
        command.args(["run", &self.toolchain, "cargo", "fuzz"]).args(arguments);
        command.current_dir(workspace::root()).env("PATH", path);
        workspace::clean_environment(&mut command);
        // The cargo that runs xtask names itself and its compiler; here they are the nightly's.
        for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "CARGO_TARGET_DIR"] {
            command.env_remove(name);
        }
        Ok(command)
    }
}

/// The newest of the installed nightlies: the plain one, which rustup updates, else the latest dated one.
fn nightly(toolchains: &str) -> Option<String> {
    let names = toolchains.lines().filter_map(|line| line.split_whitespace().next());
    let nightlies = names.filter(|name| name.starts_with("nightly"));
    nightlies.max_by_key(|name| (!name.starts_with("nightly-2"), *name)).map(str::to_owned)
}

fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries = folder.read_dir().with_context(|| format!("cannot read {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_program_seeds_and_check() {
        let fuzz = workspace::root().join("fuzz");
        let targets: Vec<_> = Target::value_variants().iter().filter(|target| **target != Target::Verdicts).collect();
        assert_eq!(files(&fuzz.join("fuzz_targets")).unwrap().len(), targets.len());
        for target in targets {
            let name = target.name();
            assert!(fuzz.join("fuzz_targets").join(name).with_extension("rs").is_file(), "{name}");
            assert!(!files(&fuzz.join("corpus-seeds").join(name)).unwrap().is_empty(), "{name}");
        }
    }

    #[test]
    fn the_newest_nightly_is_taken() {
        let list = "stable-x86_64 (active, default)\nnightly-2025-01-01-x86_64\nnightly-2026-01-01-x86_64";
        assert_eq!(nightly(list).as_deref(), Some("nightly-2026-01-01-x86_64"));
        assert_eq!(nightly(&format!("{list}\nnightly-x86_64")).as_deref(), Some("nightly-x86_64"));
        assert_eq!(nightly("stable-x86_64 (default)"), None);
    }
}
