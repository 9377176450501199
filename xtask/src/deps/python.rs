//! The virtual environment below `target/venv` with Moto and the AWS CLI. Nothing is installed outside it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::apt_install;
use crate::{cmd, ui, workspace};

/// Moto's server with the EC2 part.
const MOTO: &str = "moto[server,ec2]>=5.2,<6";
const AWS_CLI: &str = "awscli";

/// The virtual environment, complete.
pub struct Venv {
    dir: PathBuf,
}

impl Venv {
    /// Makes the environment, or finds it made.
    pub fn ensure() -> Result<Self> {
        let venv = Self { dir: workspace::target().join("venv") };
        // Written last: an environment whose making was cut short is made again.
        let complete = venv.dir.join(".complete");
        let wanted = format!("{MOTO}\n{AWS_CLI}\n");
        let working = cmd::is_executable(&venv.python()) && cmd::is_executable(&venv.aws());
        if working && std::fs::read_to_string(&complete).is_ok_and(|text| text == wanted) {
            return Ok(venv);
        }
        let python = ensure_python()?;
        ui::step("installing Moto (the EC2 API that groups come from) and the AWS CLI into target/venv");
        cmd::with_progress(
            "making the virtual environment",
            Command::new(python).args(["-m", "venv", "--clear"]).arg(&venv.dir),
        )?;
        cmd::with_progress(
            "pip install moto awscli",
            Command::new(venv.python()).args(["-m", "pip", "install", "--quiet", MOTO, AWS_CLI]),
        )?;
        std::fs::write(&complete, wanted).with_context(|| format!("cannot write {}", complete.display()))?;
        Ok(venv)
    }

    /// Where the environment's programs are.
    pub fn bin(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// The interpreter that has Moto.
    pub fn python(&self) -> PathBuf {
        self.bin().join("python")
    }

    /// The AWS CLI.
    pub fn aws(&self) -> PathBuf {
        self.bin().join("aws")
    }
}

/// A Python that can make virtual environments.
fn ensure_python() -> Result<PathBuf> {
    let able = |python: &PathBuf| cmd::succeeds(Command::new(python).args(["-c", "import venv, ensurepip"]));
    if let Some(python) = cmd::find("python3").filter(able) {
        return Ok(python);
    }
    ui::step("installing python3 python3-venv: Moto and the AWS CLI run on it");
    apt_install(&["python3", "python3-venv"])?;
    // Debian's own, even where another one without `ensurepip` comes first on PATH.
    Ok(PathBuf::from("/usr/bin/python3"))
}
