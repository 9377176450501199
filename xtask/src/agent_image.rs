//! `cargo xtask image`: the agent as a container image, with nothing but its executable and what that is linked to; and,
//! if that is asked for, the image of launched instances.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::deps::docker::Engine;
use crate::{build, image, ui};

/// Where distributions keep the certificates that an `https` endpoint is checked against.
const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

/// The command's options.
#[derive(Args)]
pub struct Options {
    /// The image's name
    #[arg(long, value_name = "NAME[:TAG]", default_value = concat!("sg-agent:", env!("CARGO_PKG_VERSION")))]
    tag: String,
    /// Make the image of launched instances anew instead (sg-agent/instance)
    #[arg(long, conflicts_with = "tag")]
    instance: bool,
}

/// Builds the agent and its image, and says how to run it.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.instance {
        image::make_instance(&Engine::ensure()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let agent = build::build(true)?;
    let engine = Engine::ensure()?;
    ui::step(&format!("making the image {}", options.tag));
    import(&engine, &agent, &options.tag)?;
    println!("{}", how_to_run(&options.tag));
    Ok(ExitCode::SUCCESS)
}

/// What it needs of a privileged container's rights: to load programs and enter namespaces, to attach them to links, and
/// to look into other containers' `/proc` entries. `--privileged` does as well.
fn how_to_run(tag: &str) -> String {
    let lines = [
        "docker run -d --name sg-agent --network host --pid host",
        "--cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE",
        "--security-opt seccomp=unconfined --security-opt apparmor=unconfined",
        "-v /sys/fs/bpf:/sys/fs/bpf -v /run/netns:/run/netns -v /run/sg-agent:/run/sg-agent",
        "-v /var/run/docker.sock:/var/run/docker.sock",
        &format!("{tag} run --endpoint-url URL"),
    ];
    lines.join(" \\\n    ")
}

/// Makes the image of an agent that was built.
pub fn import(engine: &Engine, agent: &Path, tag: &str) -> Result<()> {
    let root = tempfile::tempdir().context("cannot make a temporary directory")?;
    fill(root.path(), agent).context("cannot make the agent's image")?;
    let path = "ENV PATH=/usr/bin";
    image::load(engine, root.path(), tag, &[path, r#"ENTRYPOINT ["/usr/bin/sg-agent"]"#, r#"CMD ["run"]"#])
}

fn fill(root: &Path, agent: &Path) -> Result<()> {
    for directory in ["usr/bin", "run", "tmp", "proc", "sys", "dev", "etc/ssl/certs"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy(agent, root.join("usr/bin/sg-agent")).with_context(|| format!("cannot copy {}", agent.display()))?;
    image::copy_libraries(root, agent)?;
    let certificates = Path::new("/").join(CERTIFICATES);
    if certificates.is_file() {
        fs::copy(certificates, root.join(CERTIFICATES))?;
    } else {
        ui::note("this machine has no /etc/ssl/certs/ca-certificates.crt: the image will trust no https endpoint");
    }
    Ok(())
}
