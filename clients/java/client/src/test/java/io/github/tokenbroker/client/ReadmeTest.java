package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.net.httpserver.HttpServer;
import io.github.tokenbroker.client.okhttp.TokenInterceptor;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import okhttp3.OkHttpClient;
import okhttp3.Request;
import okhttp3.Response;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator.ReplaceUnderscores;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

@DisplayNameGeneration(ReplaceUnderscores.class)
class ReadmeTest {
  private static final String SOURCE = "src/test/java/io/github/tokenbroker/client/ReadmeTest.java";

  /** What the README shows. */
  private static void example(String endpoint, Path bearerFile) throws IOException {
    // begin
    try (TokenClient client = TokenClient.builder(endpoint).bearerFile(bearerFile).build()) {
      String url = client.token("acme").apiBaseUrl() + "/whoami";

      OkHttpClient http =
          TokenInterceptor.addTo(new OkHttpClient.Builder(), client, "acme").build();
      try (Response response = http.newCall(new Request.Builder().url(url).build()).execute()) {
        System.out.println(response.code());
      }
    }
    // end
  }

  @Test
  void the_example_sends_the_token(@TempDir Path folder) throws IOException {
    List<String> received = new CopyOnWriteArrayList<>();
    HttpServer api = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
    api.createContext(
        "/whoami",
        exchange -> {
          received.add(exchange.getRequestHeaders().getFirst("Authorization"));
          exchange.sendResponseHeaders(204, -1);
          exchange.close();
        });
    api.start();
    Path bearerFile = Files.writeString(folder.resolve("bearer"), "tbk_first");
    try (WireBroker broker = new WireBroker()) {
      broker.apiBaseUrl = "http://127.0.0.1:" + api.getAddress().getPort();
      example(broker.endpoint(), bearerFile);
    } finally {
      api.stop(0);
    }
    assertEquals(List.of("Bearer secret-1"), received);
  }

  @Test
  void the_readme_shows_the_example() throws IOException {
    String source = Files.readString(Path.of(SOURCE));
    String example =
        source.substring(source.indexOf("// begin\n") + 9, source.indexOf("    // end\n"));
    String readme = Files.readString(Path.of("../README.md"));
    assertTrue(
        readme.contains("```java\n" + example.stripTrailing().stripIndent() + "\n```"), example);
  }
}
