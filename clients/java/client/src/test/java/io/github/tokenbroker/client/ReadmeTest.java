package io.github.tokenbroker.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator.ReplaceUnderscores;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

@DisplayNameGeneration(ReplaceUnderscores.class)
class ReadmeTest {
  private static final Path README = Path.of("../README.md");

  /** Returns the first Java code of a document. */
  private static String code(Path document) throws IOException {
    return Files.readString(document).split("```java\n")[1].split("```")[0];
  }

  /** Runs the program of the README, and returns what it prints. */
  private static String run(Path folder, String endpoint, Path bearerFile) throws Exception {
    Path program = Files.writeString(folder.resolve("Program.java"), code(README));
    ProcessBuilder builder =
        new ProcessBuilder(
            Path.of(System.getProperty("java.home"), "bin", "java").toString(),
            "-cp",
            System.getProperty("java.class.path"),
            program.toString());
    builder.environment().put("TOKEN_BROKER_ENDPOINT", endpoint);
    builder.environment().put("TOKEN_BROKER_BEARER_FILE", bearerFile.toString());
    Process process = builder.redirectError(ProcessBuilder.Redirect.INHERIT).start();
    String printed = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
    assertEquals(0, process.waitFor());
    return printed.strip();
  }

  @Test
  void the_program_of_the_readme_sends_the_token(@TempDir Path folder) throws Exception {
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
      assertEquals("204", run(folder, broker.endpoint(), bearerFile));
    } finally {
      api.stop(0);
    }
    assertEquals(List.of("Bearer secret-1"), received);
  }

  @Test
  void the_lines_in_the_documents_are_those_of_the_program() throws IOException {
    String program = code(README);
    for (String line : code(Path.of("../../../docs/clients.md")).lines().toList()) {
      assertTrue(program.contains(line.replaceFirst(";$", "")), line);
    }
  }
}
