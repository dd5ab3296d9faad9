// The Rust library a2, on one thread: the contestant has one core. See bench/contract.py for what it is told and tells.
use a2::request::payload::PayloadLike;
use a2::{Client, ClientConfig, Endpoint, Error, NotificationOptions, Priority, PushType};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;
use std::{env, fs};

fn told(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

fn number(name: &str) -> usize {
    told(name).parse().unwrap_or_else(|_| panic!("{name} is not a number"))
}

fn cpu_used() -> f64 {
    let mut used: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut used) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(used.ru_utime) + seconds(used.ru_stime)
}

// Not getrusage: what that says includes the process that started us. 0 where there is no /proc.
fn peak_rss_mb() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

// A payload whose JSON is there already: the library's own builders would be measured otherwise.
#[derive(Debug)]
struct Ready<'a> {
    token: &'a str,
    json: &'a str,
    options: NotificationOptions<'a>,
}

impl serde::Serialize for Ready<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.json)
    }
}

impl PayloadLike for Ready<'_> {
    fn to_json_string(&self) -> Result<String, Error> {
        Ok(self.json.to_string())
    }
    fn get_device_token(&self) -> &str {
        self.token
    }
    fn get_options(&self) -> &NotificationOptions<'_> {
        &self.options
    }
}

// A client of a2 has one connection; several connections are several clients.
async fn send(clients: &[Client], streams: usize, tokens: &Rc<Vec<String>>, json: &Rc<String>, count: usize) -> usize {
    let next = Rc::new(Cell::new(0usize));
    let ok = Rc::new(Cell::new(0usize));
    let mut workers = Vec::new();
    for client in clients {
        for _ in 0..streams {
            let (client, tokens, json) = (client.clone(), tokens.clone(), json.clone());
            let (next, ok) = (next.clone(), ok.clone());
            workers.push(tokio::task::spawn_local(async move {
                while next.get() < count {
                    let i = next.get();
                    next.set(i + 1);
                    let options = NotificationOptions {
                        apns_topic: Some("com.example.app"),
                        apns_push_type: Some(PushType::Alert),
                        apns_priority: Some(Priority::High),
                        apns_expiration: Some(0),
                        ..Default::default()
                    };
                    let payload = Ready { token: &tokens[i % tokens.len()], json: &json, options };
                    match client.send(payload).await {
                        Ok(answer) if answer.code == 200 => ok.set(ok.get() + 1),
                        Ok(answer) => eprintln!("status {}", answer.code),
                        Err(error) => eprintln!("{error}"),
                    }
                }
            }));
        }
    }
    for worker in workers {
        worker.await.expect("a worker does not panic");
    }
    ok.get()
}

async fn run() -> bool {
    let (n, warm, streams) = (number("BENCH_N"), number("BENCH_WARM"), number("BENCH_STREAMS"));
    let key = fs::read(format!("{}/AuthKey.p8", told("BENCH_DATA"))).expect("the signing key is readable");
    let text = fs::read_to_string(told("BENCH_TOKENS")).expect("the device tokens are readable");
    let tokens = Rc::new(text.lines().map(String::from).collect::<Vec<_>>());
    let body = fs::read_to_string(format!("{}/body.json", told("BENCH_DATA"))).expect("the payload is readable");
    let json = Rc::new(body);
    let clients: Vec<Client> = (0..number("BENCH_CONNECTIONS"))
        .map(|_| {
            Client::token(key.as_slice(), "KEYID12345", "ABCDE12345", ClientConfig::new(Endpoint::Production))
                .expect("the signing key is good")
        })
        .collect();
    // the pool opens a connection for each request that finds none, so one request opens exactly one
    for client in &clients {
        send(std::slice::from_ref(client), 1, &tokens, &json, 1).await;
    }
    send(&clients, streams, &tokens, &json, warm).await;
    let (cpu, started) = (cpu_used(), Instant::now());
    let ok = send(&clients, streams, &tokens, &json, n).await;
    let (secs, cpu) = (started.elapsed().as_secs_f64(), cpu_used() - cpu);
    println!(
        "{{\"name\":\"a2\",\"version\":\"0.10.0\",\"n\":{n},\"ok\":{ok},\"secs\":{secs},\"cpu\":{cpu},\"rss_mb\":{}}}",
        peak_rss_mb()
    );
    ok == n
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
    let all_ok = tokio::task::LocalSet::new().block_on(&runtime, run());
    std::process::exit(if all_ok { 0 } else { 1 });
}
