//! Whether a request comes from a web page of somebody else's: every browser of this machine reaches the gateway, and an
//! emulator answers whoever asks. Such pages may read what the endpoint lets them, and change nothing. Nor do they read the
//! metrics of a machine that serves them to itself alone.

use std::net::IpAddr;

use http::{HeaderMap, Method, Uri, header};

/// Who the page is, if it is a page that isn't this machine's own.
pub fn foreign(method: &Method, fields: &HeaderMap) -> Option<String> {
    let text = |name: &str| fields.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    // Browsers name the page with every POST.
    if let Some(origin) = text(header::ORIGIN.as_str()) {
        let host = origin.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned));
        return (!host.is_some_and(|host| is_local(&host))).then_some(origin);
    }
    // And with a GET at least whether it is another site's (Fetch Metadata).
    if let Some(site) = text("sec-fetch-site").filter(|site| site != "same-origin" && site != "none") {
        return Some(site);
    }
    // A GET by a name that somebody has lead here is neither; no SDK makes changes by GET.
    let host = text(header::HOST.as_str()).unwrap_or_default();
    let name = host.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or(host);
    let is_known = is_local(&name) || is_address(&name) || name.ends_with(".amazonaws.com");
    (method == Method::GET && !is_known).then_some(name)
}

fn is_local(host: &str) -> bool {
    host == "localhost"
        || host.ends_with(".localhost")
        || host.ends_with(".localhost.localstack.cloud")
        || address(host).is_some_and(|address| address.is_loopback())
}

fn is_address(host: &str) -> bool {
    host.is_empty() || address(host).is_some()
}

fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, headers: &[(&str, &str)]) -> Option<String> {
        let mut request = http::Request::builder().method(method).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let head = request.body(()).unwrap().into_parts().0;
        foreign(&head.method, &head.headers)
    }

    #[test]
    fn pages_of_other_sites_are_known() {
        for headers in [
            &[("origin", "http://evil.example"), ("host", "127.0.0.1:4566")][..],
            &[("origin", "null"), ("host", "127.0.0.1:4566")],
            &[("origin", "http://evil.example:4566"), ("host", "evil.example:4566")],
            &[("origin", "http://localhost.evil.example"), ("host", "127.0.0.1:4566")],
            &[("origin", "http://192.0.2.1"), ("host", "127.0.0.1:4566")],
            &[("sec-fetch-site", "cross-site"), ("host", "127.0.0.1:4566")],
        ] {
            assert!(of("POST", headers).is_some() && of("GET", headers).is_some(), "{headers:?}");
        }
        assert!(of("GET", &[("host", "evil.example:4566")]).is_some(), "a name that was lead here");
    }

    #[test]
    fn sdks_and_pages_of_this_machine_are_not() {
        for headers in [
            &[("host", "127.0.0.1:4566")][..],
            &[("host", "sg-agent:4566")],
            &[("host", "ec2.eu-west-1.amazonaws.com")],
            &[("host", "localhost:4566"), ("origin", "http://localhost:3000")],
            &[("host", "[::1]:4566"), ("origin", "http://[::1]:3000")],
            &[("host", "localhost:4566"), ("sec-fetch-site", "none")],
        ] {
            assert_eq!(of("POST", headers), None, "{headers:?}");
        }
        for host in ["127.0.0.1:4566", "[::1]:4566", "localhost:4566", "ec2.us-east-1.amazonaws.com", "192.0.2.9:4566"]
        {
            assert_eq!(of("GET", &[("host", host)]), None, "{host}");
        }
    }
}
