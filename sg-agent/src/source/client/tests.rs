//! Each way in which a call can go wrong, on a real connection.

use super::super::answer::{DescribeSubnets, DescribeVpcPeeringConnections};
use super::super::fake::{Fake, Reply};
use super::super::fixture;
use super::*;

fn settings(url: &str, account: Option<&str>) -> Settings {
    Settings {
        endpoint: url.parse().unwrap(),
        region: "eu-west-1".into(),
        account: account.map(str::to_owned),
        emulator: true,
        timeout: Duration::from_secs(10),
    }
}

fn client(url: &str) -> Client {
    let mut client = Client::new(&settings(url, Some("210987654321"))).unwrap();
    client.back_off = Duration::from_millis(1);
    client
}

async fn error(reply: Reply) -> SourceError {
    let fake = Fake::start(move |_, _| reply.clone()).await;
    let error = client(&fake.url).all::<DescribeSubnets>(vec![]).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("DescribeSubnets") && text.contains(&fake.url), "it names the call and where: {text}");
    error
}

fn page(id: &str, next: &str) -> String {
    let token = if next.is_empty() { String::new() } else { format!("<nextToken>{next}</nextToken>") };
    let item = format!("<item><subnetId>{id}</subnetId></item>");
    format!("<DescribeSubnetsResponse>{token}<subnetSet>{item}</subnetSet></DescribeSubnetsResponse>")
}

#[tokio::test]
async fn a_call_is_signed_for_its_account_and_region() {
    let fake = Fake::start(|_, _| Reply::ok(fixture!("DescribeSubnets"))).await;
    let client = client(&fake.url);
    let parameters = vec![("Filter.1.Name".to_owned(), "a b&c".to_owned())];
    let subnets = client.all::<DescribeSubnets>(parameters).await.unwrap();
    assert_eq!(subnets[0].id, "subnet-6dacacb505271e59e");
    let [request] = &fake.requests()[..] else { panic!("more than one request") };
    let signature = &request.headers["authorization"];
    assert!(signature.starts_with("AWS4-HMAC-SHA256 Credential=210987654321/"), "{signature}");
    assert!(signature.contains("/eu-west-1/ec2/aws4_request"), "{signature}");
    assert!(signature.contains("x-amz-content-sha256") && signature.contains("x-amz-date"), "{signature}");
    assert_eq!(request.headers["x-moto-account-id"], "210987654321");
    assert_eq!(request.form["Action"], "DescribeSubnets");
    assert_eq!(request.form["Version"], "2016-11-15");
    assert_eq!(request.form["Filter.1.Name"], "a b&c");
    let body = form_urlencoded::Serializer::new(String::new())
        .extend_pairs([("Action", "DescribeSubnets"), ("Version", "2016-11-15"), ("Filter.1.Name", "a b&c")])
        .finish();
    assert_eq!(request.headers["x-amz-content-sha256"], reqsign::hash::hex_sha256(body.as_bytes()));
}

#[tokio::test]
async fn pages_are_followed_to_the_last() {
    let fake = Fake::start(|request, _| {
        Reply::ok(match request.form.get("NextToken").map(String::as_str) {
            None => page("subnet-1", "t/1="),
            Some("t/1=") => page("subnet-2", "t2"),
            Some("t2") => page("subnet-3", ""),
            Some(other) => panic!("token {other}"),
        })
    })
    .await;
    let subnets = client(&fake.url).all::<DescribeSubnets>(vec![]).await.unwrap();
    let ids: Vec<&str> = subnets.iter().map(|subnet| subnet.id.as_str()).collect();
    assert_eq!(ids, ["subnet-1", "subnet-2", "subnet-3"]);
}

#[tokio::test]
async fn pages_that_go_in_circles_are_an_error() {
    let fake = Fake::start(|_, _| Reply::ok(page("subnet-1", "again"))).await;
    let error = client(&fake.url).all::<DescribeSubnets>(vec![]).await.unwrap_err();
    assert!(matches!(&error, SourceError::EndlessPages { token, .. } if token == "again"), "{error}");
    assert_eq!(fake.requests().len(), 2);
}

#[tokio::test]
async fn a_throttled_call_is_tried_again() {
    let fake = Fake::start(|_, before| match before {
        0 => Reply::error("RequestLimitExceeded"),
        1 => Reply::with(503, "busy"),
        _ => Reply::ok(page("subnet-1", "")),
    })
    .await;
    assert_eq!(client(&fake.url).all::<DescribeSubnets>(vec![]).await.unwrap().len(), 1);
    assert_eq!(fake.requests().len(), 3);
}

#[tokio::test]
async fn throttling_without_end_is_an_error() {
    let fake = Fake::start(|_, _| Reply::error("RequestLimitExceeded")).await;
    let error = client(&fake.url).all::<DescribeSubnets>(vec![]).await.unwrap_err();
    assert!(matches!(error, SourceError::Throttled { attempts: ATTEMPTS, .. }), "{error}");
    assert_eq!(fake.requests().len(), ATTEMPTS as usize);
}

#[tokio::test]
async fn what_is_no_answer_says_so_at_once() {
    let html = error(Reply::with(500, fixture!("Error_500_tcp_no_ports"))).await;
    assert!(html.to_string().contains("HTTP 500 with what isn't XML"), "{html}");
    let html = error(Reply::with(500, "<!doctype html>\n<html lang=en>\n<title>500</title>")).await;
    assert!(html.to_string().contains("isn't XML: \"<!doctype html> <html lang=en>"), "{html}");
    let s3 = error(Reply::ok(fixture!("Unauthenticated_routes_to_S3"))).await;
    assert!(s3.to_string().contains("is the endpoint URL that of EC2?"), "{s3}");
    let refused = error(Reply::error("AuthFailure")).await;
    assert!(refused.to_string().contains("AuthFailure: said so; check the credentials"), "{refused}");
    let cut = error(Reply::ok(&fixture!("DescribeSubnets")[..900])).await;
    assert!(matches!(cut, SourceError::Answer { problem: AnswerError::Malformed(_), .. }), "{cut}");
    let redirected = error(Reply::with(302, "")).await;
    assert!(redirected.to_string().contains("HTTP 302"), "{redirected}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_none() {
    // What came is whole by itself: only the promised length tells.
    let reply = Reply { missing: 1, ..Reply::ok(page("subnet-1", "")) };
    let error = error(reply).await;
    assert!(matches!(error, SourceError::BrokenOff { received, .. } if received > 0), "{error}");
}

#[tokio::test]
async fn an_answer_may_be_only_so_large() {
    let body = page("subnet-1", "");
    let fake = Fake::start(move |_, _| Reply::ok(page("subnet-1", ""))).await;
    let mut client = client(&fake.url);
    client.body_limit = body.len();
    assert!(client.all::<DescribeSubnets>(vec![]).await.is_ok());
    client.body_limit = body.len() - 1;
    let error = client.all::<DescribeSubnets>(vec![]).await.unwrap_err();
    assert!(matches!(error, SourceError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn where_nobody_listens_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = client(&url).all::<DescribeVpcPeeringConnections>(vec![]).await.unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&url) && text.contains("refused") && text.contains("is it running"), "{text}");
}

#[tokio::test]
async fn who_never_answers_is_given_up() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let settings = Settings { timeout: Duration::from_millis(200), ..settings(&url, Some("210987654321")) };
    let error = Client::new(&settings).unwrap().all::<DescribeSubnets>(vec![]).await.unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("timed out"), "{error}");
}

#[tokio::test]
async fn user_and_password_are_not_shown() {
    assert_eq!(client("http://me:secret@127.0.0.1:5000/").url(), "http://127.0.0.1:5000/");
}
