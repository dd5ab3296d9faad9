package bench;

import com.eatthepath.pushy.apns.ApnsClient;
import com.eatthepath.pushy.apns.ApnsClientBuilder;
import com.eatthepath.pushy.apns.DeliveryPriority;
import com.eatthepath.pushy.apns.PushType;
import com.eatthepath.pushy.apns.auth.ApnsSigningKey;
import com.eatthepath.pushy.apns.util.SimpleApnsPushNotification;
import com.sun.management.OperatingSystemMXBean;
import java.io.File;
import java.lang.management.ManagementFactory;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Instant;
import java.util.List;
import java.util.Locale;
import java.util.Properties;
import java.util.concurrent.Semaphore;
import java.util.concurrent.atomic.AtomicInteger;

/** The Java library Pushy. See bench/contract.py for what it is told and tells. */
public final class Bench {
  private static final OperatingSystemMXBean SYSTEM =
      (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();

  private final ApnsClient client;
  private final List<String> tokens;
  private final Semaphore inFlight;
  private final int limit;

  /** Ready JSON, which is what the library takes. */
  private final String payload;

  private Bench(ApnsClient client, List<String> tokens, String payload, int limit) {
    this.client = client;
    this.tokens = tokens;
    this.payload = payload;
    this.limit = limit;
    this.inFlight = new Semaphore(limit);
  }

  /** Sends as Pushy's best practices say: a semaphore holds the caller back. */
  private int send(int count) throws InterruptedException {
    AtomicInteger ok = new AtomicInteger();
    for (int i = 0; i < count; i++) {
      inFlight.acquire();
      client
          .sendNotification(
              new SimpleApnsPushNotification(
                  tokens.get(i % tokens.size()),
                  "com.example.app",
                  payload,
                  Instant.EPOCH,
                  DeliveryPriority.IMMEDIATE,
                  PushType.ALERT))
          .whenComplete(
              (answer, error) -> {
                if (error != null) {
                  System.err.println(error);
                } else if (answer.isAccepted()) {
                  ok.incrementAndGet();
                } else {
                  System.err.println(answer.getRejectionReason().orElse("rejected"));
                }
                inFlight.release();
              });
    }
    inFlight.acquire(limit);
    inFlight.release(limit);
    return ok.get();
  }

  private static int number(String name) {
    return Integer.parseInt(System.getenv(name));
  }

  private static double peakRssMb() throws Exception {
    Path status = Path.of("/proc/self/status");
    if (Files.exists(status)) {
      for (String line : Files.readAllLines(status)) {
        if (line.startsWith("VmHWM:")) {
          return Double.parseDouble(line.replaceAll("[^0-9]", "")) / 1024;
        }
      }
    }
    return SYSTEM.getCommittedVirtualMemorySize() / 1048576.0;
  }

  public static void main(String[] arguments) throws Exception {
    String data = System.getenv("BENCH_DATA");
    int n = number("BENCH_N");
    int connections = number("BENCH_CONNECTIONS");
    Properties versions = new Properties();
    versions.load(Bench.class.getResourceAsStream("/versions.properties"));
    ApnsClient client =
        new ApnsClientBuilder()
            .setApnsServer("127.0.0.1", number("BENCH_PORT"))
            .setTrustedServerCertificateChain(new File(data, "ca.pem"))
            .setSigningKey(
                ApnsSigningKey.loadFromPkcs8File(new File(data, "AuthKey.p8"), "ABCDE12345", "KEYID12345"))
            .setConcurrentConnections(connections)
            .build();
    Bench bench =
        new Bench(
            client,
            Files.readAllLines(Path.of(System.getenv("BENCH_TOKENS"))),
            Files.readString(Path.of(data, "body.json")),
            number("BENCH_STREAMS") * connections);
    bench.send(number("BENCH_WARM"));
    long cpu = SYSTEM.getProcessCpuTime();
    long started = System.nanoTime();
    int ok = bench.send(n);
    double secs = (System.nanoTime() - started) / 1e9;
    double cpuUsed = (SYSTEM.getProcessCpuTime() - cpu) / 1e9;
    System.out.printf(
        Locale.ROOT,
        "{\"name\":\"pushy\",\"version\":\"%s\",\"n\":%d,\"ok\":%d,\"secs\":%f,\"cpu\":%f,\"rss_mb\":%f}%n",
        versions.getProperty("pushy"), n, ok, secs, cpuUsed, peakRssMb());
    client.close().get();
    System.exit(ok == n ? 0 : 1);
  }
}
