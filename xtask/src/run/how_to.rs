//! What `cargo xtask run` tells its user to type: the way to the control plane, and a session. Starts nothing.

use std::ffi::OsString;
use std::fmt;
use std::net::TcpListener;

use super::value_of;
use crate::{cmd, moto};

/// Where the agent's gateway listens by default.
const GATEWAY: &str = "127.0.0.1:4566";

/// Whose API it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ControlPlane {
    /// The Moto that was started for the agent.
    Moto,
    /// The user's own.
    Other,
}

/// How clients reach the control plane.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Way {
    /// By the agent's gateway, at this URL.
    Gateway(String),
    /// Directly, as was asked for: at this URL.
    Direct(String),
    /// Directly, as something has the gateway's address.
    Taken(String),
}

impl Way {
    fn url(&self) -> &str {
        let (Self::Gateway(url) | Self::Direct(url) | Self::Taken(url)) = self;
        url
    }
}

/// By which way clients go, as the agent decides it.
pub fn way(endpoint: &str, agent: &[OsString]) -> Way {
    way_if(endpoint, agent, || TcpListener::bind(GATEWAY).is_ok())
}

fn way_if(endpoint: &str, agent: &[OsString], is_free: impl Fn() -> bool) -> Way {
    let direct = agent.iter().any(|argument| argument == "--no-gateway" || argument == "--rules");
    // An emulator that isn't up yet leaves its port free; the gateway doesn't take it.
    let own = endpoint.split("://").last().map(|rest| rest.trim_end_matches('/'));
    let is_own = own.is_some_and(|own| own == GATEWAY || own == "localhost:4566");
    match value_of(agent, "--gateway") {
        _ if direct => Way::Direct(endpoint.to_owned()),
        Some(address) => Way::Gateway(format!("http://{address}")),
        // AWS itself has no gateway.
        None if endpoint.contains(".amazonaws.com") || endpoint.contains(".api.aws") => {
            Way::Direct(endpoint.to_owned())
        }
        None if !is_own && is_free() => Way::Gateway(format!("http://{GATEWAY}")),
        None => Way::Taken(endpoint.to_owned()),
    }
}

/// The commands as they are to be typed.
pub struct Commands {
    /// Only where it isn't just `aws`.
    pub aws: Option<String>,
    /// The agent, by sudo if need be.
    pub sg_agent: String,
    /// Only where it isn't just `docker`.
    pub docker: Option<&'static str>,
}

/// The text.
pub struct HowTo<'a> {
    /// Whose API.
    pub control_plane: ControlPlane,
    /// The way to it.
    pub way: Way,
    /// By which commands.
    pub commands: &'a Commands,
    /// Do instances become containers?
    pub launch: bool,
}

impl fmt::Display for HowTo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_moto = self.control_plane == ControlPlane::Moto;
        let name = if is_moto { "Moto" } else { "the endpoint" };
        writeln!(f)?;
        match &self.way {
            Way::Gateway(_) => {
                writeln!(f, "The way to {name} is the agent's gateway: a change is enforced when its call returns.")?;
            }
            Way::Direct(_) | Way::Taken(_) => {
                writeln!(f, "The way to {name} is its own address, without a gateway: the agent finds a change by")?;
                writeln!(f, "polling, some time after its call returns; `sg-agent status --wait 10` waits for that.")?;
            }
        }
        if let Way::Taken(_) = self.way {
            writeln!(f, "The gateway's address {GATEWAY} is taken: to have the gateway, end this, and start it with")?;
            writeln!(f, "another one, `-- --gateway 127.0.0.1:4577`.")?;
        }
        writeln!(f, "In another terminal:\n")?;
        write!(f, "  export AWS_ENDPOINT_URL={}", cmd::quote(self.way.url()))?;
        if is_moto {
            for (name, value) in moto::CREDENTIALS {
                write!(f, " {name}={value}")?;
            }
        }
        write!(f, "\n  alias")?;
        if let Some(aws) = &self.commands.aws {
            write!(f, " aws={}", cmd::quote(aws))?;
        }
        write!(f, " sg-agent={}", cmd::quote(&self.commands.sg_agent))?;
        if let Some(docker) = self.commands.docker {
            write!(f, " docker={}", cmd::quote(docker))?;
        }
        write!(f, "\n\n")?;
        match (self.control_plane, self.launch) {
            (ControlPlane::Moto, launch) => write!(f, "{}\n{END}", if launch { LAUNCHED } else { BY_HAND })?,
            (ControlPlane::Other, false) => f.write_str(NO_LAUNCH)?,
            (ControlPlane::Other, true) => {}
        }
        Ok(())
    }
}

/// Said where somebody else's control plane may start containers itself.
const NO_LAUNCH: &str = "\
Instances don't become containers: `-- --launch` makes them of the instances of an endpoint that only keeps book.

";

/// Said after a session.
const END: &str = "\
Moto forgets everything when it ends; what is enforced stays until `sg-agent detach`.
`cargo xtask demo` plays such a session by itself.

";

/// What to type where instances become containers by themselves.
const LAUNCHED: &str = "\
1. a key, a group, and a rule in it:
  aws ec2 create-key-pair --key-name me --query KeyMaterial --output text > me.pem; chmod 600 me.pem
  SG=$(aws ec2 create-security-group --group-name web --description web --query GroupId --output text)
  aws ec2 authorize-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
2. an instance in the group: it becomes a container, and its port 22 the host's 32022:
  SUBNET=$(aws ec2 describe-subnets --query 'Subnets[0].SubnetId' --output text)
  ID=$(aws ec2 run-instances --image-id ami-12c6146b --key-name me --subnet-id $SUBNET --security-group-ids $SG --query 'Instances[0].InstanceId' --output text)
3. what is enforced, which ports are published, by which rule one gets in, and getting in:
  sg-agent status --wait 20
  sg-agent ports
  sg-agent explain --to $ID --from 127.0.0.1 --port 22
  alias shell='ssh -i me.pem -p 32022 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectTimeout=3 root@127.0.0.1'
  shell
4. the rule goes, and nobody gets in:
  aws ec2 revoke-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
  shell
5. the instance goes, and its container with it:
  aws ec2 terminate-instances --instance-ids $ID
";

/// And where somebody has to start them.
const BY_HAND: &str = "\
1. a group, and a rule in it:
  SG=$(aws ec2 create-security-group --group-name web --description web --query GroupId --output text)
  aws ec2 authorize-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
2. an instance in the group:
  ID=$(aws ec2 run-instances --image-id ami-12c6146b --security-group-ids $SG --query 'Instances[0].InstanceId' --output text)
3. what is enforced, once a link stands for the instance (--attach $ID=LINK):
  sg-agent status --wait 10
  sg-agent explain --to $ID --from 127.0.0.1 --port 22
4. the rule goes, and nobody gets in:
  aws ec2 revoke-security-group-ingress --group-id $SG --protocol tcp --port 22 --cidr 0.0.0.0/0
  sg-agent explain --to $ID --from 127.0.0.1 --port 22
";

#[cfg(test)]
mod tests {
    use super::*;

    const MOTO: &str = "http://127.0.0.1:5000";

    #[test]
    fn clients_go_to_the_gateway_where_there_is_one() {
        let of = |endpoint: &str, agent: &[&str], is_free: bool| {
            way_if(endpoint, &agent.iter().map(OsString::from).collect::<Vec<_>>(), || is_free)
        };
        let gateway = |address: &str| Way::Gateway(format!("http://{address}"));
        let direct = || Way::Direct(MOTO.to_owned());
        assert_eq!(of(MOTO, &[], true), gateway("127.0.0.1:4566"));
        assert_eq!(of(MOTO, &[], false), Way::Taken(MOTO.to_owned()));
        assert_eq!(of(MOTO, &["--no-gateway"], true), direct());
        assert_eq!(of(MOTO, &["--gateway", "127.0.0.1:9000"], false), gateway("127.0.0.1:9000"));
        assert_eq!(of(MOTO, &["--log-drops", "--gateway=127.0.0.1:9001"], true), gateway("127.0.0.1:9001"));
        for own in ["http://127.0.0.1:4566", "http://localhost:4566/"] {
            assert_eq!(of(own, &[], true), Way::Taken(own.to_owned()), "an emulator that isn't up yet");
        }
        let aws = "https://ec2.eu-west-1.amazonaws.com";
        assert_eq!(of(aws, &[], true), Way::Direct(aws.to_owned()));
    }

    #[test]
    fn it_names_the_endpoint_credentials_and_commands() {
        let mut commands = Commands {
            aws: Some("/w/target/venv/bin/aws".to_owned()),
            sg_agent: "sudo /w/target/release/sg-agent".to_owned(),
            docker: None,
        };
        let text = |commands: &Commands, control_plane| {
            let way = Way::Gateway("http://127.0.0.1:5001".to_owned());
            HowTo { control_plane, way, commands, launch: true }.to_string()
        };
        let said = text(&commands, ControlPlane::Moto);
        assert!(said.contains("AWS_ENDPOINT_URL=http://127.0.0.1:5001 AWS_ACCESS_KEY_ID=test "), "{said}");
        let aliases = "alias aws=/w/target/venv/bin/aws sg-agent='sudo /w/target/release/sg-agent'";
        assert!(said.contains(&format!("{aliases}\n")), "{said}");
        commands.docker = Some("sudo docker");
        let said = text(&commands, ControlPlane::Moto);
        assert!(said.contains(&format!("{aliases} docker='sudo docker'\n")), "{said}");

        let commands = Commands { aws: None, sg_agent: "/w/sg-agent".to_owned(), docker: None };
        let said = text(&commands, ControlPlane::Other);
        assert!(
            said.contains("export AWS_ENDPOINT_URL=http://127.0.0.1:5001\n  alias sg-agent=/w/sg-agent\n"),
            "{said}"
        );
        assert!(!said.contains("Moto"), "{said}");
    }

    #[test]
    fn what_it_promises_of_a_change_is_so() {
        let commands = Commands { aws: None, sg_agent: "sg-agent".to_owned(), docker: None };
        let text =
            |way| HowTo { control_plane: ControlPlane::Moto, way, commands: &commands, launch: true }.to_string();
        let promise = "enforced when its call returns";
        let choose = "--gateway 127.0.0.1:4577";
        let said = text(Way::Gateway(format!("http://{GATEWAY}")));
        assert!(said.contains(promise) && !said.contains(choose), "{said}");
        let said = text(Way::Direct(MOTO.to_owned()));
        assert!(!said.contains(promise) && said.contains("polling") && !said.contains(choose), "{said}");
        let said = text(Way::Taken(MOTO.to_owned()));
        assert!(!said.contains(promise) && said.contains("polling") && said.contains(choose), "{said}");
    }
}
