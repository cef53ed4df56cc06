package io.github.tokenbroker.example;

import static org.assertj.core.api.Assertions.assertThat;

import com.sun.net.httpserver.HttpServer;
import io.github.tokenbroker.client.TokenClient;
import io.github.tokenbroker.client.WireBroker;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.springframework.beans.factory.annotation.Autowired;
import org.springframework.boot.test.context.SpringBootTest;
import org.springframework.boot.test.context.SpringBootTest.WebEnvironment;
import org.springframework.boot.test.context.TestConfiguration;
import org.springframework.boot.test.web.client.TestRestTemplate;
import org.springframework.context.annotation.Bean;

@SpringBootTest(
    webEnvironment = WebEnvironment.RANDOM_PORT,
    properties = "spring.main.allow-bean-definition-overriding=true")
class ExampleApplicationTest {
  @TempDir static Path folder;

  private static WireBroker broker;
  private static HttpServer api;

  @BeforeAll
  static void start() throws IOException {
    Files.writeString(folder.resolve("bearer"), "tbk_first");
    api = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0);
    api.createContext(
        "/whoami",
        exchange -> {
          byte[] body =
              exchange
                  .getRequestHeaders()
                  .getFirst("Authorization")
                  .getBytes(StandardCharsets.UTF_8);
          exchange.sendResponseHeaders(200, body.length);
          exchange.getResponseBody().write(body);
          exchange.close();
        });
    api.start();
    broker = new WireBroker();
    broker.apiBaseUrl = "http://127.0.0.1:" + api.getAddress().getPort();
  }

  @AfterAll
  static void stop() {
    broker.close();
    api.stop(0);
  }

  /** Takes the place of the client of the environment, which a test cannot change. */
  @TestConfiguration
  static class Clients {
    @Bean
    TokenClient tokenClient() {
      return TokenClient.builder(broker.endpoint()).bearerFile(folder.resolve("bearer")).build();
    }
  }

  @Test
  void theApiGetsTheToken(@Autowired TestRestTemplate http) {
    assertThat(http.getForObject("/whoami", String.class)).isEqualTo("Bearer secret-1");
  }
}
